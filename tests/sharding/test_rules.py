"""Logical axes to mesh axes: what the strategies say, and what is refused."""

import dataclasses

import jax
import pytest

from sharding import AxisRules, ShardingError, axes, decoding_rules, training_rules

RULES = training_rules(sequence_parallel=False)


def test_rules_speak_the_whole_vocabulary():
    assert tuple(f.name for f in dataclasses.fields(AxisRules)) == axes.LOGICAL_AXES


def test_training_splits_rows_over_replicas_and_weights_over_fsdp_and_tensor():
    assert RULES.spec(("batch", "sequence", None)) == jax.P(
        ("data", "fsdp"), "context", None
    )
    assert RULES.spec(("layers", "embed", "heads", None)) == jax.P(
        None, "fsdp", "tensor", None
    )
    assert RULES.spec(("embed", "vocab")) == jax.P("fsdp", "tensor")
    assert RULES.spec(()) == jax.P()


def test_sequence_parallelism_splits_the_residual_stream_and_nothing_else():
    parallel = training_rules(sequence_parallel=True)
    assert parallel.mesh_axes("residual") == ("context", "tensor")
    assert dataclasses.replace(parallel, residual=("context",)) == RULES


def test_decoding_never_splits_a_sequence():
    rules = decoding_rules()
    assert rules.spec(("batch", "sequence", "heads", None)) == jax.P(
        ("data", "fsdp"), None, "tensor", None
    )
    assert rules.mesh_axes("residual") == ()


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("head", "heads"), ("batches", "batch"), ("vocabs", "vocab")],
)
def test_an_unknown_logical_axis_gets_a_suggestion(name, suggestion):
    with pytest.raises(ShardingError, match=f"Did you mean '{suggestion}'"):
        RULES.spec(("batch", name))


def test_an_axis_like_no_other_gets_the_list():
    with pytest.raises(ShardingError, match="no logical axis. The logical axes are ba"):
        RULES.mesh_axes("zzz")


def test_two_dimensions_split_by_one_mesh_axis_are_refused():
    with pytest.raises(ShardingError, match="'tensor' would split two dimensions"):
        RULES.spec(("heads", "vocab"))
    # A batch and a weight's rows both lie over fsdp, among other axes.
    with pytest.raises(ShardingError, match="'fsdp'.*map one of them to another"):
        RULES.spec(("batch", "embed"))


def test_a_rule_that_names_no_mesh_axis_is_refused():
    with pytest.raises(ShardingError, match="rule 'mlp' names 'model'.*data, fsdp"):
        dataclasses.replace(RULES, mlp=("model",))
    # A string is a sequence of letters, none of them a mesh axis.
    with pytest.raises(ShardingError, match="rule 'mlp' names 't'.*a tuple of"):
        dataclasses.replace(RULES, mlp="tensor")
