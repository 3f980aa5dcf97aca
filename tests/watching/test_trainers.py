"""Callbacks within the trainers of other libraries: what they log is what torch computes."""

import csv
import importlib.util
import logging
import subprocess
import sys

import pytest
from support.torchvision_aside import aside_if_broken

import curvd

torch = pytest.importorskip("torch")
nn = torch.nn

# What the libraries say about themselves and others while they are imported and run.
pytestmark = pytest.mark.filterwarnings("ignore")


def points():
    torch.manual_seed(0)
    return torch.randn(48, 4), torch.randint(3, (48,))


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def sharpness(module, x, y):
    """The largest eigenvalue of the Hessian, by torch alone."""
    shapes = {name: p.shape for name, p in module.named_parameters()}
    sizes = [shape.numel() for shape in shapes.values()]

    def objective(flat):
        flats = zip(flat.split(sizes), shapes.values(), strict=True)
        parts = [p.view(shape) for p, shape in flats]
        given = dict(zip(shapes, parts, strict=True))
        outputs = torch.func.functional_call(module, given, x.double())
        return nn.functional.cross_entropy(outputs, y)

    flat = torch.cat([p.detach().double().reshape(-1) for p in module.parameters()])
    return float(torch.linalg.eigvalsh(torch.func.hessian(objective)(flat))[-1])


METRICS = ("sharpness", "loss")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "64-true"])
@pytest.mark.parametrize("part", ["model", "all"])
def test_a_lightning_trainer_logs_curvature_at_its_steps(
    live_target, tmp_path, part, precision
):
    """Also where it converts the module, and sets attributes of it."""
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("lightning is not installed: pip install '.[lightning]'")
    with aside_if_broken():
        import lightning.pytorch as lightning
    from curvd.watching.lightning import WatchCallback

    class Training(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, x):
            return self.model(x)

        def training_step(self, batch, index):
            callback.watch.wait()  # so small a net trains faster than it is sent
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    x, y = points()
    model = net()
    training = Training(model)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(x, y), batch_size=16
    )
    logger = lightning.loggers.CSVLogger(tmp_path)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with curvd.connect(live_target) as client:
        watched = model if part == "model" else training
        session = client.session_for(
            watched, nn.CrossEntropyLoss(), (x, y), batch_size=48
        )
        callback = WatchCallback(session, every=6, metrics=METRICS)
        trainer = lightning.Trainer(
            accelerator="cpu",
            precision=precision,
            max_steps=12,
            accumulate_grad_batches=2,
            logger=logger,
            callbacks=[callback],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
        )
        trainer.fit(training, loader)
    assert trainer.global_step == 12 and callback.watch.closed
    assert callback.watch.errors == 0
    path = tmp_path / "lightning_logs/version_0/metrics.csv"
    rows = [
        row
        for row in csv.DictReader(path.read_text().splitlines())
        if row["curvature/sharpness"]
    ]
    assert [row["step"] for row in rows] == ["6", "12"]
    model.double()
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model(x.double()), y))
    assert float(rows[-1]["curvature/loss"]) == pytest.approx(loss, rel=1e-5)
    exact = sharpness(model, x, y)
    assert float(rows[-1]["curvature/sharpness"]) == pytest.approx(exact, rel=2e-3)


class Classifier(nn.Module):
    """A module as the Trainer of transformers wants it: it computes its own loss."""

    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels=None):
        logits = self.net(x)
        loss = None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}])
@pytest.mark.parametrize("part", ["net", "all"])
def test_a_trainer_of_transformers_logs_curvature_at_its_steps(
    live_target, tmp_path, part, precision
):
    """In mixed precision, too, where accelerate puts autocast around the model."""
    with aside_if_broken():
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        from curvd.watching.transformers import WatchCallback

    shown = {}

    class Shown(transformers.TrainerCallback):
        """Behind the watch, as what shows logs is."""

        def on_log(self, args, state, control, logs=None, **more):
            shown.update(logs)

        def on_step_end(self, args, state, control, **more):
            callback.watch.wait()

    x, y = points()
    model = Classifier()
    dataset = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=12,
        logging_steps=12,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **precision,
    )
    watched, output = (model.net, None) if part == "net" else (model, "logits")
    with curvd.connect(live_target) as client:
        session = client.session_for(
            watched, nn.CrossEntropyLoss(), (x, y), batch_size=48, output=output
        )
        callback = WatchCallback(session, every=6, metrics=METRICS)
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=dataset,
            callbacks=[callback, Shown()],
        )
        trainer.train()
    assert callback.watch.closed and callback.watch.errors == 0
    found = [e for e in trainer.state.log_history if "curvature/sharpness" in e]
    assert [entry["step"] for entry in found] == [6, 12]
    with torch.no_grad():
        loss = float(nn.functional.cross_entropy(model.net(x), y))
    assert found[-1]["curvature/loss"] == pytest.approx(loss, rel=1e-5)
    exact = sharpness(model.net, x, y)
    assert found[-1]["curvature/sharpness"] == pytest.approx(exact, rel=2e-3)
    assert "curvature/sharpness" in shown


def test_a_training_goes_on_without_a_watch_that_cannot_begin(
    live_target, tmp_path, caplog
):
    with aside_if_broken():
        transformers = pytest.importorskip("transformers")
        pytest.importorskip("accelerate")
        from curvd.watching.transformers import WatchCallback
    x, y = points()
    model, other = Classifier(), nn.Linear(4, 3)
    dataset = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    with curvd.connect(live_target) as client:
        session = client.session_for(
            other, nn.CrossEntropyLoss(), (x, y), batch_size=48
        )
        for wrong in ({"metrics": "bend"}, {"every": 0}):
            with pytest.raises(curvd.InvalidSpec):
                WatchCallback(session, **wrong)
        callback = WatchCallback(session)
        trainer = transformers.Trainer(
            model=model, args=arguments, train_dataset=dataset, callbacks=[callback]
        )
        with caplog.at_level(logging.WARNING, logger="curvd"):
            trainer.train()
    assert trainer.state.global_step == 2 and callback.watch is None
    assert f"the watch of session {session.id}: its beginning failed" in caplog.text
    assert "not the module of the session" in caplog.text


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("transformers", "transformers", "trainer"),
        ("lightning", "lightning.pytorch.callbacks", "lightning"),
    ],
)
def test_without_the_library_its_extra_is_named(module, library, extra):
    code = (
        "import sys\n"
        f"sys.modules[{library.partition('.')[0]!r}] = None\n"
        f"import curvd.watching.{module}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"pip install -c constraints.txt '.[{extra}]'" in done.stderr
