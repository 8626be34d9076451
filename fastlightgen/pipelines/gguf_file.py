"""Export as GGUF, in the layout that ComfyUI-GGUF reads: original keys, the matrices of the blocks quantised.

What is not a matrix of a block stays as it is: float32, or bfloat16 where the network is. GGUF knows four dimensions;
a tensor with more is written flat, and a field beside it holds its shape.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastlightgen.atomic import claimed, put
from fastlightgen.config import UserError
from fastlightgen.models.base import VideoDiT
from fastlightgen.models.folder.original import to_original
from fastlightgen.pipelines.comfyui import comfy_of, compared, matrices, shown_card, table_of

BLOCK = 32  # numbers that share a scale
MOST = 4  # dimensions of a tensor in GGUF
SHAPE = "comfy.gguf.orig_shape."


def need_gguf() -> Any:
    try:
        import gguf
    except ImportError:
        raise UserError("to=gguf: gguf is not installed: pip install 'fastlightgen[gguf]'") from None
    return gguf


def write_gguf(model: VideoDiT, card: dict, out: Path, dtype: torch.dtype, quant: str) -> dict[str, Any]:
    """Write the network to OUT, read the file back, and compare. Return the bytes and the differences."""
    gguf = need_gguf()
    comfy = comfy_of(model, card, "gguf")
    state = {key: value.detach().to("cpu", dtype) for key, value in to_original(model, table_of(model)).items()}
    names = {f"{name}.weight" for name in matrices(state)}
    for name in sorted(names):
        if (width := state[name].shape[1]) % BLOCK:
            raise UserError(f"quant={quant}: {name} has rows of {width}, not a multiple of {BLOCK}; use to=comfyui")
    kinds = gguf.GGMLQuantizationType
    with claimed(temporary := out.with_name(f".{out.name}.tmp")):
        writer = gguf.GGUFWriter(temporary, comfy.gguf)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string("fastlightgen", json.dumps(shown_card(model, card)))
        for key, value in state.items():
            wide = kinds.BF16 if value.dim() > 1 and dtype == torch.bfloat16 else kinds.F32
            kind = kinds[quant.upper()] if key in names else wide
            if value.dim() > MOST:
                writer.add_array(f"{SHAPE}{key}", list(value.shape))
                value = value.flatten(1)
            writer.add_tensor(key, gguf.quants.quantize(value.float().numpy(), kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        put(temporary, out)
    del state
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}

    def read(key: str) -> Tensor:
        values = gguf.quants.dequantize(found[key].data, found[key].tensor_type)
        return torch.from_numpy(np.array(values, dtype=np.float32))

    return {"bytes": out.stat().st_size} | compared(model, read)
