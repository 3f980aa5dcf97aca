"""The pages for each kind of user: their programs run, and find what torch alone does."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")
nn = torch.nn

DOCS = Path(__file__).parent.parent / "docs"


@pytest.fixture
def run(live_target, tmp_path, monkeypatch):
    """Run a page's programs in an empty folder; what they named."""
    monkeypatch.chdir(tmp_path)
    names = {}

    def run(page):
        text = (DOCS / f"user_{page}.md").read_text()
        for program in re.findall(r"```python\n(.*?)```", text, re.S):
            code = program.replace("127.0.0.1:50551", live_target)
            exec(compile(code, f"docs/user_{page}.md", "exec"), names)
        return names

    yield run
    names["client"].close()


def objective(net, loss, x, y):
    """The loss as a function of flat parameters, and these, in float64."""
    shapes = {name: p.shape for name, p in net.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def outputs(flat):
        parts = zip(flat.split(sizes), shapes.items(), strict=True)
        given = {name: part.view(shape) for part, (name, shape) in parts}
        return torch.func.functional_call(net, given, x.double())

    flat = torch.cat([p.detach().double().reshape(-1) for p in net.parameters()])
    return outputs, lambda flat: loss(outputs(flat), y), flat


def test_a_training_job(run):
    found = run("training")
    reading = found["watch"].readings[-1]
    torch.manual_seed(0)
    x, y = torch.randn(512, 20), torch.randint(0, 4, (512,))
    net = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 4))
    for _ in range(reading.step):
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        with torch.no_grad():
            for p in net.parameters():
                p -= 0.5 * p.grad
    _, loss, flat = objective(net, nn.functional.cross_entropy, x, y)
    H = torch.func.hessian(loss)(flat)
    exact = float(torch.linalg.eigvalsh(H)[-1])
    assert reading["sharpness"] == pytest.approx(exact, rel=3e-3)
    slack = 2 * reading.errors["trace"]
    assert reading["trace"] == pytest.approx(float(H.trace()), abs=slack)
    assert len(Path("curvature.csv").read_text().splitlines()) > 1


def test_a_second_order_optimiser(run):
    found = run("second_order")
    assert found["losses"][-1] < 0.05 * found["losses"][0]
    with torch.no_grad():
        loss = nn.functional.mse_loss(found["net"](found["x"]), found["y"])
    assert float(loss) == pytest.approx(found["loss"], rel=1e-4)


def test_a_laplace_approximation(run):
    found = run("laplace")
    outputs, _, flat = objective(found["net"], None, found["x"], None)
    J = torch.func.jacrev(outputs)(flat).squeeze(1)  # [N, P]
    precision = J.T @ J / 0.1**2 + torch.eye(len(flat), dtype=torch.float64)
    there, _, _ = objective(found["net"], None, found["points"], None)
    g = torch.func.jacrev(there)(flat).squeeze(1).T
    exact = torch.einsum("pk,pk->k", g, torch.linalg.solve(precision, g))
    variance = torch.from_numpy(found["found"].variance[:, 0])
    torch.testing.assert_close(variance, exact, rtol=1e-4, atol=0.0)
    evidence = found["evidence"]
    exact = float(torch.linalg.slogdet(precision).logabsdet)
    at_one = evidence.log_determinants[evidence.priors == 1.0]
    assert at_one == pytest.approx([exact], rel=1e-6)


def test_influence_functions(run):
    found = run("influence")
    assert 7 in found["suspects"]
    assert found["harmful"][0] == 7
    outputs, _, flat = objective(found["net"], None, found["x"], None)
    J, p = torch.func.jacrev(outputs)(flat), outputs(flat).softmax(1)
    metric = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    G = torch.einsum("nap,nab,nbq->pq", J, metric, J) / len(p)
    damped = G + 1e-2 * torch.eye(len(flat), dtype=torch.float64)
    rows = torch.func.jacrev(
        lambda flat: nn.functional.cross_entropy(
            outputs(flat), found["y"], reduction="none"
        )
    )(flat)
    x, label = found["test"]
    _, loss, _ = objective(found["net"], nn.functional.cross_entropy, x, label)
    exact = rows @ torch.linalg.solve(damped, torch.func.grad(loss)(flat))
    torch.testing.assert_close(
        torch.from_numpy(found["found"].scores[0]).double(),
        exact,
        rtol=1e-2,
        atol=1e-2 * float(exact.abs().max()),
    )


def test_a_laptop(run):
    pytest.importorskip("matplotlib")
    found = run("laptop")
    net = nn.Sequential(nn.Flatten(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    net.load_state_dict({n: torch.tensor(v) for n, v in found["state"].items()})
    data = {name: torch.tensor(value) for name, value in found["data"].items()}
    _, loss, flat = objective(
        net.double(), nn.functional.cross_entropy, data["x"], data["y"]
    )
    exact = torch.linalg.eigvalsh(torch.func.hessian(loss)(flat)).numpy()[-5:][::-1]
    np.testing.assert_allclose(found["top"].values, exact, rtol=1e-5)
    np.testing.assert_allclose(sorted(found["same"])[::-1], exact, rtol=1e-5)
    assert Path("density.png").exists()


def test_the_commands_of_a_laptop_are_there(run, live_target):
    session = run("laptop")["session"].id
    text = (DOCS / "user_laptop.md").read_text().partition("```\ncurvd ")[2]
    commands = ("curvd " + text.partition("```")[0]).strip().splitlines()
    assert len(commands) == 3
    for command in commands:
        words = command.replace("127.0.0.1:50551", live_target).split()[1:]
        words = [session if word == "$SESSION" else word for word in words]
        subprocess.run(
            [sys.executable, "-m", "curvd.cli", *words], check=True, capture_output=True
        )
    assert {p.name for p in Path().glob("*.png")} >= {"eigenvalues.png", "density.png"}


def test_every_page_is_run_here():
    text = Path(__file__).read_text()
    for page in DOCS.glob("user_*.md"):
        assert f'run("{page.stem.removeprefix("user_")}")' in text, page.name
