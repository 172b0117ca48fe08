"""The training loop: a stopped and resumed run is bit for bit an uninterrupted one; what goes wrong is said in one sentence."""

import os
import signal

import pytest
import torch
from torch import nn

from neural_graphs.data import DataError
from neural_graphs.tasks.training import StopRequest, TrainConfig, Trainer, step_generator

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = TrainConfig(steps=30, batch=4, warmup=5, eval_every=10)


class StopAfter:
    """Stands for a signal that arrives before the n-th look."""

    def __init__(self, looks):
        self.looks = looks

    @property
    def requested(self):
        self.looks -= 1
        return self.looks < 0


def make_trainer(config=CONFIG, identity=None, poison=None):
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, 2))

    def batch_loss(model, step, generator):
        x = torch.randn(config.batch, 3, generator=generator)
        loss = nn.functional.cross_entropy(model(x).float(), (x[:, 0] > 0).long())
        return loss * (float("nan") if step == poison else 1.0), torch.tensor(0.5)

    def evaluate(model):
        return {"test_accuracy": float(model[0].weight.detach().double().sum())}

    return Trainer(model, batch_loss, evaluate, config, identity or {"data": {"name": "x", "size": [1, 2]}})


def state_of(trainer):
    tensors = dict(trainer.model.state_dict())
    for index, entry in trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{index}.{name}": value for name, value in entry.items()}
    return tensors


@pytest.mark.parametrize("stop_at", [[1], [13], [10], [3, 11, 9]])
def test_resumed_equals_uninterrupted(tmp_path, stop_at):
    whole = make_trainer()
    assert whole.run(tmp_path / "whole.pt")
    for looks in stop_at:
        trainer = make_trainer()
        if (tmp_path / "part.pt").exists():
            trainer.load(tmp_path / "part.pt")
        torch.manual_seed(99)  # of no consequence: the generator's state is in the checkpoint
        if (tmp_path / "part.pt").exists():
            trainer.load(tmp_path / "part.pt")
        else:
            torch.manual_seed(7)
            trainer = make_trainer()
        assert not trainer.run(tmp_path / "part.pt", stop=StopAfter(looks))
    assert trainer.step == sum(stop_at)
    torch.manual_seed(1234)
    last = make_trainer()
    last.load(tmp_path / "part.pt")
    assert last.run(tmp_path / "part.pt") and last.step == 30
    assert last.history == whole.history
    assert all(torch.equal(value, state_of(whole)[name]) for name, value in state_of(last).items())


def test_a_finished_run_stays_as_it_is(tmp_path):
    trainer = make_trainer()
    trainer.run(tmp_path / "x.pt")
    again = make_trainer()
    again.load(tmp_path / "x.pt")
    assert again.run(tmp_path / "x.pt") and again.history == trainer.history and len(again.history) == 3


def test_schedule():
    config = TrainConfig(steps=1000, lr=1.0, warmup=100)
    assert config.lr_at(0) == pytest.approx(0.01) and config.lr_at(999) < 1e-5
    assert max(range(1000), key=config.lr_at) in (99, 100)


def test_checkpoints_of_other_runs_are_refused(tmp_path):
    make_trainer().run(tmp_path / "x.pt")
    other = make_trainer(identity={"data": {"name": "y", "size": [1, 2]}})
    with pytest.raises(DataError, match=r"belongs to another run \(data.name: x there, y now\); start anew with --fresh"):
        other.load(tmp_path / "x.pt")
    longer = make_trainer(TrainConfig(steps=31, batch=4, warmup=5, eval_every=10))
    with pytest.raises(DataError, match="train.steps: 30 there, 31 now"):
        longer.load(tmp_path / "x.pt")
    torch.save({"model": {}}, tmp_path / "y.pt")
    with pytest.raises(DataError, match="y.pt is not a checkpoint of this version"):
        other.load(tmp_path / "y.pt")
    (tmp_path / "x.pt").write_bytes((tmp_path / "x.pt").read_bytes()[:-100])
    with pytest.raises(DataError, match="x.pt is corrupt.*start anew with --fresh"):
        make_trainer().load(tmp_path / "x.pt")


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    trainer = make_trainer(poison=17)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 20; lower the learning rate"):
        trainer.run(tmp_path / "x.pt")
    assert not (tmp_path / "x.pt").exists()


def test_progress_is_reported(tmp_path):
    seen = []
    make_trainer().run(tmp_path / "x.pt", on_step=seen.append)
    assert [p.step for p in seen] == [20, 30] and seen[-1].steps == 30 and seen[0].loss > 0 and seen[0].steps_per_second > 0


def test_signals_become_a_request_and_a_second_one_interrupts():
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_step_generators_differ():
    draws = {(seed, step): float(torch.rand((), generator=step_generator(seed, step))) for seed in range(3) for step in range(50)}
    assert len(set(draws.values())) == len(draws)


def test_errors():
    with pytest.raises(ValueError, match="expected steps >= 1, got 0"):
        TrainConfig(steps=0)
    with pytest.raises(ValueError, match="expected lr > 0, got -1"):
        TrainConfig(lr=-1)
