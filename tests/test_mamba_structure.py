"""Models with Mamba-2 blocks: what a file says of them, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_blocks_differ import EQUAL, changed, read

from runtime.errors import UserError
from runtime.model_file.container import GgufPart
from runtime.model_file.structure import Attention, Mamba2, Structure
from runtime.model_file.structure_reading import read_structure
from runtime.model_file.tensor_shapes import block_tensors
from runtime.model_file.writer import write_gguf

HYBRID = replace(
    EQUAL,
    norm="rms", ffn_gate="none", ffn_activation="relu2", ffn_bias=False, attention_bias=False, rope_dimension_count=0,
    feed_forward_length=(0, 64, 0, 64), head_count_kv=(0, 0, 2, 0),
    ssm_conv_kernel=4, ssm_state_size=16, ssm_group_count=2, ssm_inner_size=48, ssm_time_step_rank=(6, 0, 0, 6),
)  # fmt: skip


def test_a_block_has_attention_or_mamba() -> None:
    assert [block.mixer for block in HYBRID.blocks] == [
        Mamba2(6, 8, 16, 2, 4), None, Attention(4, 2, 8), Mamba2(6, 8, 16, 2, 4)
    ]  # fmt: skip
    assert list(HYBRID.mambas) == [0, 3]
    assert list(HYBRID.attentions) == [2]
    mamba = HYBRID.mambas[0]
    assert (mamba.inner_length, mamba.conv_channels) == (48, 48 + 2 * 2 * 16)
    assert (mamba.conv_state, mamba.scan_state) == (3 * 112, 16 * 48)


def test_mamba_blocks_come_back_from_a_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", HYBRID.to_metadata(), [])
    metadata = GgufPart(tmp_path / "m.gguf").metadata
    assert metadata["lazyneuron.schema_version"] == 3
    assert metadata["lazyneuron.ssm.time_step_rank"].tolist() == [6, 0, 0, 6]
    assert read_structure(metadata, "m.gguf") == HYBRID


def test_keys_of_mamba_are_not_in_other_files() -> None:
    assert not any(".ssm." in key for key in EQUAL.to_metadata())


def test_a_mamba_block_has_llama_cpps_tensors() -> None:
    assert block_tensors(HYBRID, 0) == {
        "attn_norm.weight": (32,),
        "ssm_in.weight": (32, 2 * 48 + 2 * 2 * 16 + 6),
        "ssm_conv1d.weight": (4, 112),
        "ssm_conv1d.bias": (112,),
        "ssm_dt.bias": (6,),
        "ssm_a": (1, 6),
        "ssm_d": (1, 6),
        "ssm_norm.weight": (24, 2),
        "ssm_out.weight": (48, 32),
    }
    assert {"ssm_in.weight", "ffn_norm.weight", "ffn_up.weight"} <= set(block_tensors(HYBRID, 3))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ssm__time_step_rank": [6, 0, 6, 6]}, "block 2: attention and Mamba, expected one of them"),
        ({"ssm__time_step_rank": [6, 0, 0, 7]}, "block 3: ssm.time_step_rank is 7, expected 0 (no Mamba), or a number"),
        ({"ssm__time_step_rank": [6, 0, 0, -1]}, "block 3: ssm.time_step_rank is -1, expected 0"),
        ({"ssm__time_step_rank": [6, 0, 0, 3]}, "block 3: 3 Mamba heads, expected a multiple of the 2 groups"),
        ({"ssm__time_step_rank": [6, 0]}, "`lazyneuron.ssm.time_step_rank` has 2 values, expected 4, one per block"),
        ({"ssm__time_step_rank": [0, 0, 0, 6]}, "block 0: neither attention nor Mamba nor FFN"),
        ({"ssm__conv_kernel": 1}, "ssm.conv_kernel is 1, expected 2 to 64"),
        ({"ssm__state_size": 0}, "ssm.state_size is 0, expected 1 to 4096"),
        ({"ssm__group_count": 0}, "ssm.group_count is 0, expected 1 to"),
        ({"ssm__inner_size": -48}, "ssm.inner_size is -48, expected 1 to"),
        ({"ssm__inner_size": 1 << 30}, "ssm.inner_size is 1073741824, expected 1 to"),
        ({"ssm__inner_size": [48] * 4}, "`lazyneuron.ssm.inner_size` is [48, 48, 48, 48], expected int"),
    ],
)
def test_values_of_mamba_that_make_no_sense_are_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        read(changed(HYBRID, **keys))
    assert message in caught.value.message


def test_no_rotation_at_all_needs_mamba_blocks() -> None:
    assert isinstance(read(changed(HYBRID)), Structure)
    with pytest.raises(UserError, match=r"rope.dimension_count is 0, expected an even number"):
        read(changed(EQUAL, rope__dimension_count=0))
