"""Block-diagonal products are right in every block and for every mini-batch's shape.

The linear program joins weight gradients where the mini-batch is small, so the last,
ragged mini-batch runs another program than the others.
"""

import pytest

torch = pytest.importorskip("torch")
from curvd.contract.enums import Dtype  # noqa: E402
from curvd.contract.specs import DatasetSpec, LossSpec, OperatorSpec  # noqa: E402
from curvd_server.engine.objective.objective import Problem  # noqa: E402
from curvd_server.engine.operators import linearize  # noqa: E402
from curvd_server.engine.tuning import plan  # noqa: E402
from curvd_server.engine.verification import agreement, verify  # noqa: E402
from curvd_server.models import builders  # noqa: E402


@pytest.fixture(scope="module")
def problem():
    """A convolutional net with 32, 32 and 4 images per mini-batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = builders.BUILDERS["cnn"]({"widths": [16, 32]}).eval()
        images, labels = torch.randn(68, 1, 8, 8), torch.randint(0, 10, (68,))
    return Problem.load(
        module,
        module.state_dict(),
        {"x": images, "y": labels},
        DatasetSpec(inputs=("x",), target="y", batch_size=32),
        LossSpec(name="cross_entropy"),
        dtype=Dtype.FLOAT64,
    )


def one_block_per_tensor(problem):
    return OperatorSpec(block_sizes=(1,) * len(problem.parameters))


def test_the_linear_program_agrees_with_double_backward_in_every_block(problem):
    spec = one_block_per_tensor(problem)
    assert (
        agreement.disagreements(
            problem, spec, "program", "double_backward", batched=False
        )
        == ()
    )


class OffInOneBlock:
    """A linearisation that is wrong in the rows of one block only."""

    def __init__(self, *arguments):
        self.right = linearize.MODES["double_backward"](*arguments)

    def product(self, tangents, block, *, batched):
        rows = self.right.product(tangents, block, batched=batched)
        return [1.03 * row for row in rows] if block == range(3, 4) else rows


def test_a_mode_that_is_off_in_one_block_is_refused_by_name(problem, monkeypatch):
    monkeypatch.setitem(linearize.MODES, "program", OffInOneBlock)
    spec = one_block_per_tensor(problem)
    mode = plan.Plan("program")
    plainer = plan._plainer(verify.Reference(problem, spec), mode)
    assert plan.disagreements_of(problem, spec, mode, plainer) == ("4.weight",)
