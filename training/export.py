"""Trained weights -> `gemma4-demo.gguf`: an F32 GGUF, then llama.cpp's own llama-quantize.

    python training/export.py WEIGHTS VOCAB.json F32.gguf
    python training/export.py --quantize LLAMA_QUANTIZE F32.gguf OUT.gguf

WEIGHTS is the path without `.0.pt` of what train.py saved, or the word `random` for fresh weights of the same shape.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from model import Gemma4, Shape, rope_freqs, state
from vocabulary import BOS, EOS, PAD, UNK, Vocabulary

TEMPLATE = Path(__file__).with_name("chat_template.jinja")
# Which type each tensor gets: llama-quantize's Q4_K_M mix (which raises attn_v and half of ffn_down to Q6_K by itself),
# with the types of small or sensitive tensors set by name. Rows that are no multiple of 256 (proj: 128) fall back.
QUANTIZE = ["--token-embedding-type", "q6_K", "--tensor-type", "per_layer_token_embd=q4_K",
            "--tensor-type", "attn_k=q6_K"]  # fmt: skip


def add_metadata(writer: gguf.GGUFWriter, shape: Shape) -> None:
    """Keys as in the real files, in their order."""
    layers = range(shape.layers)
    writer.add_type("model")
    writer.add_name("Gemma4 Demo")
    writer.add_basename("gemma4-demo")
    writer.add_description("A small model in the shape of Gemma 4 E2B, trained from scratch on public-domain prose.")
    writer.add_license("mit")
    writer.add_languages(["en"])
    writer.add_sampling_temp(0.7)
    writer.add_sampling_top_k(40)
    writer.add_sampling_top_p(0.95)
    writer.add_sampling_penalty_repeat(1.1)  # so small a model else falls into loops
    writer.add_sampling_penalty_last_n(64)
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length([shape.ffn_width(i) for i in layers])
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(shape.theta_global)
    writer.add_rope_freq_base_swa(shape.theta)
    writer.add_layer_norm_rms_eps(shape.eps)
    writer.add_key_length(shape.head_dim_global)
    writer.add_value_length(shape.head_dim_global)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_final_logit_softcapping(shape.softcap)
    writer.add_sliding_window(shape.window)
    writer.add_shared_kv_layers(shape.shared)
    writer.add_embedding_length_per_layer_input(shape.ple)
    writer.add_sliding_window_pattern([shape.is_sliding(i) for i in layers])
    writer.add_key_length_swa(shape.head_dim)
    writer.add_value_length_swa(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim_global)
    writer.add_rope_dimension_count_swa(shape.head_dim)


def add_tokenizer(writer: gguf.GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model("gemma4")
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_scores([-1000.0] * len(vocabulary.tokens))
    writer.add_token_types(vocabulary.types)
    writer.add_token_merges(vocabulary.merges)
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_unk_token_id(UNK)
    writer.add_pad_token_id(PAD)
    writer.add_mask_token_id(4)
    writer.add_chat_template(TEMPLATE.read_text())
    writer.add_add_space_prefix(False)
    writer.add_add_bos_token(True)


def write(path: Path, weights: dict[str, torch.Tensor], vocabulary: Vocabulary, shape: Shape) -> None:
    writer = gguf.GGUFWriter(str(path), "gemma4")
    add_metadata(writer, shape)
    add_tokenizer(writer, vocabulary)
    writer.add_tensor("rope_freqs.weight", rope_freqs(shape).numpy())
    for name, tensor in weights.items():
        array = np.ascontiguousarray(tensor.float().numpy())
        if name.startswith("per_layer_model_proj"):  # llama-quantize leaves this one alone; real files have it in BF16
            bf16 = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(name, gguf.quants.quantize(array, bf16), raw_dtype=bf16)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(arguments: list[str]) -> None:
    if arguments[0] == "--quantize":
        tool, source, target = arguments[1:]
        subprocess.run([tool, *QUANTIZE, source, target, "Q4_K_M", "2"], check=True)
        return
    weights, vocabulary, target = arguments
    words = Vocabulary.load(Path(vocabulary))
    if weights == "random":
        torch.manual_seed(0)
        shape = Shape(vocab=len(words.tokens))
        tensors = state(Gemma4(shape))
    else:
        saved = [torch.load(f"{weights}.{part}.pt", weights_only=True) for part in (0, 1)]
        shape, tensors = Shape(**saved[0]["shape"]), saved[0]["weights"] | saved[1]["weights"]
    write(Path(target), tensors, words, shape)
    print(f"{target}: {sum(t.numel() for t in tensors.values()):,} parameters, {dataclasses.asdict(shape)}")


if __name__ == "__main__":
    main(sys.argv[1:])
