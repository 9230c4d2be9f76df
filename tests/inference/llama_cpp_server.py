"""llama.cpp's server on a float32 model folder: python llama_cpp_server.py FOLDER PORT

Needs `pip install xllamacpp gguf safetensors`. llama.cpp's own converter writes such files too, but
is not on PyPI. FOLDER/model.gguf is written beside the weights.
"""

import json
import sys
import time
from pathlib import Path

import gguf
import xllamacpp
from safetensors.numpy import load_file


def write_gguf(folder: Path) -> Path:
    config = json.loads((folder / "config.json").read_text())
    num_layers, num_rows = config["num_hidden_layers"], config["vocab_size"]
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_block_count(num_layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads["q_proj"])
    writer.add_head_count_kv(heads["k_proj"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(num_rows)
    add_tokenizer(writer, json.loads((folder / "tokenizer.json").read_text()), num_rows)
    writer.add_eos_token_id(config["eos_token_id"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, num_layers)
    for name, tensor in load_file(folder / "model.safetensors").items():
        for part, count in heads.items():
            if part in name:  # the two halves of what turns stand side by side there
                halves = tensor.reshape(count, 2, -1, tensor.shape[-1])
                tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder / "model.gguf"


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict, num_rows: int) -> None:
    texts, kinds = [f"[{row}]" for row in range(num_rows)], [gguf.TokenType.UNUSED] * num_rows
    for text, row in tokenizer["model"]["vocab"].items():
        texts[row], kinds[row] = text, gguf.TokenType.NORMAL
    for added in tokenizer["added_tokens"]:
        texts[added["id"]], kinds[added["id"]] = added["content"], gguf.TokenType.CONTROL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    merges = tokenizer["model"]["merges"] or ["a b"]  # it wants one
    writer.add_token_merges([pair if isinstance(pair, str) else " ".join(pair) for pair in merges])


def serve(path: Path, port: int) -> None:
    params = xllamacpp.CommonParams()
    params.model.path, params.port, params.hostnames = str(path), port, ["127.0.0.1"]
    params.n_parallel, params.n_ctx = 4, 4 * 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    while True:
        time.sleep(1)


if __name__ == "__main__":
    serve(write_gguf(Path(sys.argv[1])), int(sys.argv[2]))
