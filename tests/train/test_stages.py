"""Stages: wherever a run of two is cut, it ends with the same bits, and two stages that are alike are one."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from documents import make_documents, make_grammar
from flax import nnx
from test_loop import assert_same_bits, crash, stop_at, without_times
from training_cases import language, regression

from omni.data.loader import mixed_rows, rows_of_each
from omni.data.shards import TokenShards, write_shards
from omni.experiment import load_experiment, override
from omni.sharding import MeshConfig
from omni.train.loop import TrainConfig, train
from omni.train.metrics import read_metrics
from omni.train.optimizer import OptimizerConfig, make_schedule
from omni.train.program import check_row_length
from omni.train.stages import Stage, legs, of_stage, programs
from omni_tokenizers.errors import UsageError


def staged(output, *stages, **settings) -> TrainConfig:
    """The small transformer in stages; every step is logged, every second saved."""
    steps = sum(stage.steps for stage in stages)
    return language(output, **{"stages": stages, "steps": steps, "checkpoint_every": 2, "keep": 9} | settings)


def extended(output) -> TrainConfig:
    """Five steps, then five with longer rows of two sets, fewer at once, another schedule, other frozen parameters."""
    first, other = language(output).task.data, language(output, documents=90).task.data
    longer = {
        "task.data": {first: 0.7, other: 0.3},
        "task.row_length": 96,
        "batch_size": 4,
        "optimizer.learning_rate": 3e-4,
        "optimizer.frozen": ("embedding",),
    }
    return staged(output, Stage(5, {"optimizer.frozen": ("blocks.query*",)}), Stage(5, longer))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(configuration, final state, log) of the extended run in one go."""
    config = extended(tmp_path_factory.mktemp("undisturbed") / "run")
    return config, train(config), read_metrics(config.output)


def position(config: TrainConfig, step: int) -> dict:
    return json.loads((Path(config.output) / "checkpoints" / str(step) / "data" / "metadata").read_text())


def test_cut_anywhere_it_ends_the_same(tmp_path, monkeypatch, undisturbed):
    """Crashes in the first stage, before and behind the boundary and in the second stage, one after another: state, log
    and data position have the bits of a run in one go."""
    expected, state, log = undisturbed
    moved = {"output": str(tmp_path / "run")}
    config = dataclasses.replace(expected, **moved)
    for step, goes_on in ((3, 2), (5, 4), (6, 5), (9, 8)):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="crash"):
            stop_at(patch, step, crash)
            train(config)
        assert max(int(path.name) for path in (Path(config.output) / "checkpoints").iterdir()) == goes_on
    assert_same_bits(train(config), state)
    assert without_times(read_metrics(config.output)) == without_times(log)
    assert position(config, 10) == position(expected, 10) and position(config, 10)["iterator"] != {}
    assert [line["stage"] for line in log] == [1] * 5 + [2] * 5


def test_what_is_frozen_in_one_stage_moves_in_another(undisturbed):
    """Each stage leaves alone what it freezes; the moments of what moves in both are carried over."""
    config, state, _ = undisturbed
    (_, first), (_, second) = programs(config)
    start = first.start()
    begun, ended = (
        {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(each.params)} for each in (start, state)
    )
    assert all((begun[name] != ended[name]).any() for name in begun)  # each moved in one of the stages at least
    marked = jax.tree.map(lambda x: x + 1, start)
    carried = second.take_over(marked, first)
    old, new = (
        {jax.tree_util.keystr(path)[-60:]: leaf for path, leaf in jax.tree.leaves_with_path(each)}
        for each in (jax.eval_shape(first.start).optimizer, carried.optimizer)
    )
    fresh = {name for name in new if name not in old}
    assert fresh and all("query" in name for name in fresh)
    for name, leaf in new.items():
        assert (np.asarray(leaf) == (name not in fresh)).all(), name


def test_two_alike_are_one(tmp_path):
    """Cut in two, with the same mixture and the schedule of the whole, a run has the bits of one that is not cut."""
    first, other = language(tmp_path / "a").task.data, language(tmp_path / "a", documents=90).task.data
    whole = staged(tmp_path / "whole", Stage(9))
    mixed = dataclasses.replace(whole.task, data={first: 0.6, other: 0.4})
    whole = dataclasses.replace(whole, task=mixed)
    cut = dataclasses.replace(whole, output=str(tmp_path / "cut"), stages=(Stage(4), Stage(5)))
    assert_same_bits(train(whole), train(cut))
    logs = [[{**line, "stage": 1} for line in without_times(read_metrics(each.output))] for each in (whole, cut)]
    assert logs[0] == logs[1]


def test_sets_go_on_where_they_stand(tmp_path):
    """A set that was in the stage before in the same place reads on; a new one and other lengths of rows begin."""
    first, other = language(tmp_path / "a").task.data, language(tmp_path / "a", documents=90).task.data
    task = language(tmp_path / "a").task
    both = dataclasses.replace(task, data={first: 0.5, other: 0.5})
    longer = dataclasses.replace(both, row_length=96)

    def read(task, count, before=()):
        dataset = task.next_dataset(0, before)
        return [dataset[index]["ids"].tobytes() for index in range(count)]

    alone = read(task, 40)
    second = read(both, 20, [(task, 11)])
    assert set(alone[11:18]) < set(second) and not set(alone[:11]) & set(second)
    assert read(both, 5, [(longer, 7)]) == read(both, 5)
    assert read(both, 9, [(task, 3), (both, 4), (both, 6)]) == read(both, 19, [(task, 3)])[10:]


def test_rows_of_each_set_are_counted(tmp_path):
    """The count is that of going through the mixture row by row."""
    grammar = make_grammar()
    documents = list({document.ids.tobytes(): document for document in make_documents(grammar, 400)}.values())
    parts = [(documents[:60], 0.5), (documents[60:90], 0.3), (documents[90:110], 0.2)]
    sets = [
        (TokenShards(write_shards(tmp_path / str(place), part, grammar.vocabulary, grammar, {})), share)
        for place, (part, share) in enumerate(parts)
    ]
    origin = {document.ids.tobytes(): place for place, (part, _) in enumerate(parts) for document in part}
    mixed, counts = mixed_rows(sets, 48, seed=1), [0, 0, 0]
    for number in range(60):
        assert rows_of_each(sets, 48, 1, number) == counts
        row = mixed[number]
        counts[origin[row["ids"][row["segments"] == 1].tobytes()]] += 1
    assert min(counts) > 5


def test_a_schedule_spans_the_run_or_the_stage():
    """A stage that changes the schedule has one of its own, however many steps were skipped before; others have the
    run's."""
    config = regression("unused", stages=(Stage(8, {"optimizer.frozen": ()}), Stage(4, {"optimizer.warmup_steps": 2})))
    assert [leg.schedule for leg in legs(config)] == [range(12), range(8, 12)]
    optimizer = OptimizerConfig(warmup_steps=2)
    moved, own = make_schedule(optimizer, 4, begin=8), make_schedule(optimizer, 4)
    assert [float(moved(step)) for step in range(8, 12)] == [float(own(step)) for step in range(4)]
    assert float(moved(5)) == float(own(0))


def test_steps_can_be_set_on_the_command_line():
    """Stages are numbered there, and what they change is by name."""
    config = regression("unused", stages=(Stage(8), Stage(4, {"batch_size": 16})))
    arguments = ["--stages.0.steps", "2", "--steps", "6", "--stages.1.changes.batch-size", "24"]
    assert override(config, arguments, "omni train x.py").stages == (Stage(2), Stage(4, {"batch_size": 24}))


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        (lambda: (Stage(0),), "a stage has 0 steps"),
        (lambda: (Stage(5), Stage(5)), r"steps is 12, but the stages have 5 \+ 5 = 10"),
        (lambda: (Stage(12, {"mesh.fsdp": 2}),), "a stage changes 'mesh.fsdp'; what can change are batch_size"),
        (
            lambda: (Stage(12, {"task.widht": 2}),),
            "stage 1 changes 'task.widht': there is no setting 'widht'; .*'width'",
        ),
        (
            lambda: (Stage(6), Stage(6, {"optimizer.name": "muon"})),
            "stage 2 changes optimizer.name, which is one for all",
        ),
        (
            lambda: (Stage(6), Stage(6, {"task.width": 8})),
            "stage 2: its net has other parameters than that of the first",
        ),
        (
            lambda: (Stage(6), Stage(6, {"batch_size": 7, "optimizer.accumulation": 2})),
            "stage 2: batch_size 7 does not",
        ),
        (lambda: (Stage(6), Stage(6, {"optimizer.frozen": ("layers.*",)})), "stage 2: .*no parameter is named 'layers"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_trained(tmp_path, stages, said):
    """By the stage's number, with what to do."""
    with pytest.raises(UsageError, match=said):
        train(regression(tmp_path / "run", stages=stages()))
    assert read_metrics(tmp_path / "run") == []


def test_rows_that_do_not_split_over_context(tmp_path):
    """They are refused with the number of which their length is to be a multiple, not repeated on every device."""
    config = dataclasses.replace(language(tmp_path / "run"), mesh=MeshConfig(data=1, context=5))
    with pytest.raises(UsageError, match=r"rows of 48 tokens do not split over mesh.context 5; .* multiple of 5"):
        check_row_length(config)
    check_row_length(dataclasses.replace(config, mesh=MeshConfig(data=1, context=6)))


def test_the_example_has_two_stages():
    """The experiment file loads, and its stages differ in what its docstring says."""
    config = load_experiment(Path(__file__).parents[2] / "experiments" / "pods" / "length_extension.py")
    first, second = legs(config)
    assert (first.config.task.row_length, second.config.task.row_length) == (4096, 32_768)
    assert (first.schedule, second.schedule) == (range(100_000), range(90_000, 100_000))
    assert of_stage(config, 2) == second.config
    with pytest.raises(UsageError, match="there is no stage 3; the run has 2"):
        of_stage(config, 3)
