"""Whole runs: what they leave behind, resuming, divergence, refusals, Ctrl-C."""

import dataclasses
import hashlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
from string import ascii_letters

import jax
import numpy as np
import pytest
from flax import nnx

import models
from models.text.characters import save_characters
from training.__main__ import _what_is_lost
from training.arrays import write_arrays
from training.config import TrainingConfig, load_config, save_config
from training.loop import Diverged, TrainingLoop
from training.metrics import read_metrics
from training.run_folder import RunFolderGone
from training.trainer import Trainer

TEXT = "the quick brown fox jumps over the lazy dog and runs away again\n" * 200


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setenv("WSEKERN_CACHE", str(tmp_path / "cache"))
    data = tmp_path / "text.txt"
    data.write_text(TEXT)
    return TrainingConfig(
        data=(str(data),),
        out=str(tmp_path / "run"),
        wafer="2x2",
        context=16,
        batch=4,
        steps=6,
        warmup=2,
        eval_every=4,
        eval_batches=2,
        log_every=1,
        checkpoint_minutes=0,
        sample_tokens=5,
    )


def losses(config):
    return {row["step"]: row["loss"] for row in read_metrics(config.run_dir)}


def test_a_run_leaves_everything_in_its_folder(config):
    result = Trainer(config).fit()
    assert (result.step, result.stopped) == (6, False)
    assert result.loss < np.log(256)
    names = {path.name for path in config.run_dir.iterdir()}
    wanted = {"metrics.jsonl", "config.json", "checkpoints", "loss.png", "sample.txt", "model"}
    assert wanted <= names
    lines = (config.run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert all({"step", "loss", "tokens_per_s", "seconds"} <= row.keys() for row in rows)
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 6]
    assert result.sample is not None and result.sample.startswith("\n")
    assert len(result.sample.encode()) >= 1 + 5


@pytest.mark.parametrize("preset", ["nano", "gpt2-nano"])
def test_a_model_of_characters_has_its_vocabulary_and_can_be_trained_on(preset, config, tmp_path):
    short = dataclasses.replace(config, steps=1, sample_tokens=0, wafer="1x2", preset=preset)
    first = Trainer(dataclasses.replace(short, tokens="characters"))
    folder = first.fit().run_dir / "model"
    tokenizer = models.load_tokenizer(folder)
    assert tokenizer.encode(TEXT) == list(first.corpus.encode(TEXT))
    assert models.load(folder).config.vocab == tokenizer.vocab == len(set(TEXT))
    more = Trainer(dataclasses.replace(short, init=str(folder), out=str(tmp_path / "more")))
    assert more.corpus.tokenizer is not None and more.fit().step == 1
    again = models.load_tokenizer(tmp_path / "more" / "model")
    assert again.fingerprint == tokenizer.fingerprint
    (tmp_path / "text.txt").write_text(TEXT + "é")
    with pytest.raises(ValueError, match=r"text.txt'.*vocabulary lacks: 'é'"):
        Trainer(dataclasses.replace(short, init=str(folder), out=str(tmp_path / "third")))


def test_a_checkpoint_trained_on_bytes_does_not_keep_its_own_tokenizer(config, tmp_path):
    short = dataclasses.replace(config, steps=1, sample_tokens=0, wafer="1x1", eval_batches=1)
    (tmp_path / "init").mkdir()
    save_characters(ascii_letters, tmp_path / "init")
    models.save(
        models.Decoder(models.find_preset("nano"), rngs=nnx.Rngs(0)),
        tmp_path / "init",
    )
    run = Trainer(dataclasses.replace(short, init=str(tmp_path / "init"), tokens="bytes")).fit()
    assert models.load_tokenizer(run.run_dir / "model").source == "bytes"


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(config, tmp_path):
    Trainer(dataclasses.replace(config, out=str(tmp_path / "whole"))).fit()
    whole = losses(dataclasses.replace(config, out=str(tmp_path / "whole")))
    half = dataclasses.replace(config, checkpoint_every=3)
    _stop_after(half, 3)
    result = Trainer(dataclasses.replace(half, resume=True)).fit()
    assert result.step == 6
    assert losses(half) == whole


def test_a_run_saved_under_the_old_name_of_the_optimizer_resumes(config):
    """Files as they were written before version 0.2: state["optimiser"], spelled so on disk."""
    _stop_after(config, 3)
    folder = config.run_dir / "checkpoints" / "3"
    fields = json.loads((folder / "manifest.json").read_text().replace("optimizer", "optimiser"))
    assert any(leaf["path"].startswith("optimiser/") for leaf in fields["leaves"])
    for path in sorted((folder / "arrays").rglob("*optimizer*"), reverse=True):
        path.rename(path.with_name(path.name.replace("optimizer", "optimiser")))
    for path in (folder / "arrays").iterdir():
        if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"optimizer", b"optimiser"))
    del fields["sha256"]
    content = json.dumps(fields, sort_keys=True).encode()
    fields["sha256"] = hashlib.sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(fields, indent=1))
    assert Trainer(dataclasses.replace(config, resume=True)).fit().step == 6


def test_a_run_resumes_on_another_mesh_within_rounding(config, tmp_path):
    whole_config = dataclasses.replace(config, out=str(tmp_path / "whole"))
    Trainer(whole_config).fit()
    _stop_after(config, 3)
    Trainer(dataclasses.replace(config, resume=True, wafer="1x4")).fit()
    got, want = losses(config), losses(whole_config)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), atol=2e-4)


@pytest.mark.parametrize("split_first", [True, False])
def test_a_run_resumes_with_its_state_split_or_whole(config, tmp_path, split_first):
    config = dataclasses.replace(config, wafer="2x1x2", split_state=split_first)
    whole_config = dataclasses.replace(config, out=str(tmp_path / "whole"))
    Trainer(whole_config).fit()
    _stop_after(config, 3)
    other = dataclasses.replace(config, resume=True, split_state=not split_first)
    Trainer(other).fit()
    got, want = losses(config), losses(whole_config)
    assert got.keys() == want.keys()
    np.testing.assert_allclose(list(got.values()), list(want.values()), atol=2e-4)


def _stop_after(config, step):
    """Runs until a signal comes while step `step` is in flight."""
    trainer = Trainer(config)
    take_step = TrainingLoop._take_step

    def stopping(run):
        take_step(run)
        if run.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_take_step", stopping)
        result = trainer.fit()
    assert (result.step, result.stopped) == (step, True)
    assert trainer.open_checkpoints().steps()[-1] == step


def test_divergence_stops_and_keeps_the_last_good_checkpoint(config):
    wild = dataclasses.replace(config, checkpoint_every=1, steps=50, clip_norm=0.0)
    trainer = Trainer(wild)
    take_step = TrainingLoop._take_step

    def take_step_with_nan(run):
        if run.step == 3:
            run.state["params"] = jax.tree.map(lambda x: x * float("nan"), run.state["params"])
        take_step(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_take_step", take_step_with_nan)
        with pytest.raises(Diverged, match="at step 4 the loss is nan.*step 3 is the last good"):
            trainer.fit()
    result = Trainer(dataclasses.replace(wild, resume=True, steps=4)).fit()
    assert result.step == 4 and np.isfinite(result.loss)


def test_a_state_that_an_update_has_broken_is_not_saved(config):
    """The losses of step 3 and before it are finite; its update is not. One step is kept."""
    wild = dataclasses.replace(config, checkpoint_every=1, keep=1)
    trainer = Trainer(wild)
    take_step = TrainingLoop._take_step

    def take_step_that_breaks(run):
        step = run.programs.step

        def broken(state, *batch):
            after, metrics = step(state, *batch)
            if run.step == 2:
                run.programs = dataclasses.replace(run.programs, step=step)
                after["params"] = jax.tree.map(lambda x: x * float("nan"), after["params"])
            return after, metrics

        run.programs = dataclasses.replace(run.programs, step=broken)
        take_step(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_take_step", take_step_that_breaks)
        expected = "after the update of step 3 the loss is nan; step 2 is the last good checkpoint"
        with pytest.raises(Diverged, match=expected):
            trainer.fit()
    assert trainer.open_checkpoints().steps() == [2]
    assert Trainer(dataclasses.replace(wild, resume=True)).fit().step == 6


def test_moments_that_are_not_finite_are_not_saved(config):
    trainer = Trainer(dataclasses.replace(config, checkpoint_every=3))
    check = TrainingLoop._check_state

    def check_with_broken_moments(run):
        run.state["optimizer"] = jax.tree.map(
            lambda x: x * float("inf") if x.dtype == "float32" else x, run.state["optimizer"]
        )
        check(run)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_check_state", check_with_broken_moments)
        with pytest.raises(Diverged, match="update of step 3 the state is not finite; no check"):
            trainer.fit()


def test_a_run_folder_that_is_removed_ends_the_run(config):
    trainer = Trainer(dataclasses.replace(config, steps=1000, checkpoint_every=1))
    take_step = TrainingLoop._take_step

    def take_step_and_remove(run):
        take_step(run)
        if run.step == 3:
            run.checkpoints.wait()
            shutil.rmtree(config.run_dir)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingLoop, "_take_step", take_step_and_remove)
        with pytest.raises(RunFolderGone, match="run was removed or renamed while the run went on"):
            trainer.fit()
    assert not config.run_dir.exists()


def test_a_sample_that_fails_costs_neither_model_nor_loss_curve(config, monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no sample")

    monkeypatch.setattr("training.loop.generate", fail)
    with pytest.raises(RuntimeError, match="no sample"):
        Trainer(config).fit()
    assert (config.run_dir / "model" / "config.json").is_file()
    assert (config.run_dir / "loss.png").is_file()
    monkeypatch.undo()
    assert Trainer(dataclasses.replace(config, resume=True)).fit().sample is not None


def test_a_model_that_cannot_be_written_is_no_success(config, monkeypatch):
    def fail(model, folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.loop.save", fail)
    assert not Trainer(dataclasses.replace(config, steps=1)).fit().saved
    monkeypatch.undo()
    again = Trainer(dataclasses.replace(config, steps=1, resume=True)).fit()
    assert again.saved and (config.run_dir / "model" / "config.json").is_file()


def test_a_last_step_that_cannot_be_saved_says_where_resuming_goes_on(config, monkeypatch, capsys):
    def full_from(step):
        def write(folder, arrays):
            if int(folder.parent.name.removesuffix(".partial")) >= step:
                raise OSError(28, "No space left on device")
            write_arrays(folder, arrays)

        monkeypatch.setattr("training.step_folder.write_arrays", write)

    config = dataclasses.replace(config, steps=3, checkpoint_every=2, sample_tokens=0)
    full_from(3)
    result = Trainer(config).fit()
    assert (result.saved, result.step, result.resumes_from) == (False, 3, 2)
    assert _what_is_lost(result) == "step 3 could not be saved; --resume goes on from step 2"
    assert "go on with --resume" not in capsys.readouterr().out
    full_from(0)
    result = Trainer(dataclasses.replace(config, out=config.out + "2")).fit()
    assert (result.saved, result.resumes_from) == (False, None)
    assert _what_is_lost(result).endswith("no step is saved: --resume starts with the first")


def test_resuming_removes_and_names_what_was_cut_short(config, capsys):
    Trainer(dataclasses.replace(config, steps=1)).fit()
    (config.run_dir / "checkpoints" / "2.partial").mkdir()
    (config.run_dir / ".loss.png.12345678.partial").touch()
    capsys.readouterr()
    Trainer(dataclasses.replace(config, steps=2, resume=True)).fit()
    printed = capsys.readouterr().out
    assert "removed 2.partial, whose saving or removal was cut short" in printed
    assert "removed .loss.png.12345678.partial, a file that was cut short" in printed
    assert sorted(os.listdir(config.run_dir / "checkpoints")) == ["1", "2"]


def test_a_folder_that_cannot_be_used_is_refused_before_the_data_is_read(config, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "llama"}')
    for out, message in (("file", "is no folder"), ("other", "'model_type' is not a name")):
        with pytest.raises((ValueError, OSError), match=f"out: .*{message}"):
            Trainer(dataclasses.replace(config, data=("nowhere.txt",), out=str(tmp_path / out)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preset": "nanno"}, "did you mean 'nano'"),
        ({"context": 65}, "context=65 is longer than that of preset 'nano', 64"),
        ({"wafer": "8x8"}, "64 CPU devices are needed, but jax has already started with 16"),
        ({"resume": True}, "holds no run"),
        ({"data": ("nowhere.txt",)}, "nowhere.txt"),
        ({"tokens": "characters", "prompt": "é"}, "prompt='é': 'é' is not in the"),
    ],
)
def test_refuses_before_any_work(config, changes, message):
    with pytest.raises((ValueError, OSError, RuntimeError), match=message):
        Trainer(dataclasses.replace(config, **changes))


def test_a_choice_that_is_changed_in_the_saved_file_is_noticed(config):
    Trainer(dataclasses.replace(config, steps=1)).fit()
    path = config.run_dir / "config.json"
    path.write_text(path.read_text().replace('"beta2": 0.99', '"beta2": 0.98'))
    changed = dataclasses.replace(config, resume=True, steps=2, beta2=0.98)
    wanted = r"config.json has been changed: beta2=0.98 \(the checkpoint was made with 0.99\)"
    with pytest.raises(ValueError, match=wanted):
        Trainer(changed).fit()


def test_a_second_run_does_not_overwrite_the_first(config):
    Trainer(dataclasses.replace(config, steps=1)).fit()
    with pytest.raises(ValueError, match="holds a run already"):
        Trainer(config)


def test_a_resumed_run_whose_config_differs_is_refused_field_by_field(config):
    Trainer(dataclasses.replace(config, steps=1)).fit()
    changed = dataclasses.replace(config, resume=True, seed=1, learning_rate=0.1)
    with pytest.raises(ValueError, match="seed: 0 was saved, 1 is given") as error:
        Trainer(changed)
    assert "learning_rate: 0.001 was saved, 0.1 is given" in str(error.value)


def test_a_run_that_was_stopped_before_it_saved_resumes_at_its_beginning(config):
    Trainer(config).fit()
    shutil.rmtree(config.run_dir / "checkpoints")
    result = Trainer(dataclasses.replace(config, resume=True)).fit()
    assert result.step == 6 and len(losses(config)) == 6


def test_a_finished_run_resumed_takes_no_step_and_keeps_its_figures(config, capsys):
    first = Trainer(config).fit()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.trainer.compile_programs", None)  # it compiles nothing
        again = Trainer(dataclasses.replace(config, resume=True)).fit()
    assert again == first
    assert "is finished, at step 6 of 6, validation loss" in capsys.readouterr().out
    longer = dataclasses.replace(config, resume=True, sample_tokens=9)
    sample = Trainer(longer).fit().sample
    assert sample is not None and first.sample is not None
    assert len(sample.encode()) > len(first.sample.encode())
    with pytest.raises(ValueError, match="steps=4: the run in .* is at step 6 already"):
        Trainer(dataclasses.replace(config, resume=True, steps=4))


def test_a_finished_run_whose_text_is_gone_is_finished(config, capsys):
    first = Trainer(dataclasses.replace(config, steps=1)).fit()
    for path in config.data:
        pathlib.Path(path).rename(f"{path}.moved")
    saved = load_config(config.run_dir / "config.json")
    assert Trainer(dataclasses.replace(saved, resume=True)).fit() == first
    assert "is finished, at step 1 of 1" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match="is no file, directory or pattern"):
        Trainer(dataclasses.replace(saved, resume=True, steps=2))


def test_a_resumed_run_may_find_its_data_elsewhere(config, tmp_path):
    Trainer(dataclasses.replace(config, steps=1)).fit()
    moved = tmp_path / "moved.txt"
    moved.write_text(TEXT)
    elsewhere = dataclasses.replace(config, resume=True, steps=2)
    assert Trainer(dataclasses.replace(elsewhere, data=(str(moved),))).fit().step == 2
    moved.write_text(TEXT[1:] * 2)
    with pytest.raises(ValueError, match="data: the text differs"):
        Trainer(dataclasses.replace(elsewhere, data=(str(moved),), steps=3)).fit()


def test_text_without_a_line_end_is_sampled_from_its_first_character(config, tmp_path):
    (tmp_path / "line.txt").write_text(TEXT.replace("\n", " "))
    line = dataclasses.replace(
        config, data=(str(tmp_path / "line.txt"),), tokens="characters", steps=1
    )
    sample = Trainer(line).fit().sample
    assert sample is not None and sample.startswith("t")


@pytest.mark.slow
def test_ctrl_c_saves_and_exits_with_75(config):
    """The command itself, as a user stops it."""
    command = [sys.executable, "-m", "training", "--config", str(config.run_dir.parent / "c.json")]
    long = dataclasses.replace(config, steps=100_000, sample_tokens=0, eval_every=0)
    save_config(long, config.run_dir.parent / "c.json")
    root = pathlib.Path(__file__).parents[2]
    process = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    metrics = config.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_text()):
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 75, output
    assert Trainer(dataclasses.replace(long, resume=True)).open_checkpoints().steps()
