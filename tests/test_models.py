"""Files that cannot be models, code that must not run, and writes that fail half-way: what would clutter the chapter on models."""
import json, os, pickle, struct, subprocess, sys

import pytest, torch
from safetensors.torch import load_file, save_file

from mechinterp_lib import models
from mechinterp_lib.core import InputError
from mechinterp_lib.data import char_tokenizer
from mechinterp_lib.models import describe_model, forward_logits, import_llama2c, import_nanogpt, list_models, load_model, new_model, save_model

GPT2 = {"class": "GPT2LMHeadModel", "vocab_size": 6, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
NATIVE = {"class": "attention_only", "d_vocab": 6, "n_ctx": 16, "d_model": 16, "n_layers": 2, "n_heads": 2, "d_head": 8}
TEXT = "To be, o"


class Bomb:
    "Unpickled, it makes a file: the proof that a pickle was opened."
    def __init__(self, path): self.path = str(path)
    def __reduce__(self): return (open, (self.path, "w"))


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    "A home with one shipped model of each kind."
    monkeypatch.setenv("MECHINTERP_HOME", str(tmp_path))
    for name, architecture in (("gpt/seed0", GPT2), ("native", NATIVE)):
        save_model(new_model(architecture, 0), char_tokenizer(TEXT), tmp_path / "models" / name, {"validation_loss": 1.25})
    return tmp_path / "models"


def refuse(action, *words):
    with pytest.raises(InputError) as caught: action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words: assert word in message, message
    return message


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


# shipped models

def test_list_and_describe(shelf):
    save_model(new_model(GPT2, 0), None, shelf / "gpt/seed10")
    save_model(new_model(GPT2, 0), None, shelf / "gpt/seed2")
    (shelf / ".hidden.part").mkdir()
    (shelf / ".hidden.part" / "config.json").write_text("{}")
    assert list_models() == ["gpt/seed0", "gpt/seed2", "gpt/seed10", "native"]
    row = describe_model("gpt/seed0")
    assert row | {"parameters": 0} == {"name": "gpt/seed0", "class": "GPT2LMHeadModel", "parameters": 0, "n_layers": 2, "n_heads": 2,
                                       "d_model": 16, "n_ctx": 16, "validation_loss": 1.25, "best_step": None, "validation_accuracy": None}
    assert row["parameters"] == sum(weight.numel() for weight in new_model(GPT2, 0).parameters())
    assert describe_model("gpt/seed2")["validation_loss"] is None
    refuse(lambda: describe_model("gpt/seed1"), "gpt/seed10")

def test_a_family_is_its_only_seed_or_answered_with_its_seeds(shelf):
    assert load_model("gpt", device="cpu")("To be").shape == (1, 5, 6)
    save_model(new_model(GPT2, 1), None, shelf / "gpt/seed1")
    refuse(lambda: load_model("gpt"), "gpt/seed0", "gpt/seed1")

def test_a_value_left_at_its_default_is_described(shelf):
    edit_config(shelf / "gpt/seed0", n_layer=...)                       # as transformers writes a GPT-2 of 12 layers
    assert describe_model("gpt/seed0")["n_layers"] == 12

@pytest.mark.parametrize("file, content", [("training.json", "[]"), ("training.json", "{"), ("config.json", '{"architectures": ["TransformerLensNative"]}')])
def test_what_cannot_be_described(shelf, file, content):
    (shelf / "native" / file).write_text(content)
    refuse(lambda: describe_model("native"), file)

@pytest.mark.parametrize("name", ["gpt/seed0", "native"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_shipped_models_load_and_run(shelf, name, dtype):
    model = load_model(name, device="cpu", dtype=dtype)
    assert not model.training and {weight.dtype for weight in model.original_model.parameters()} == {getattr(torch, dtype or "float32")}
    assert model.to_tokens("To be").shape == (1, 5) and model("To be").shape == (1, 5, 6)
    assert len(model.tokenizer) == 6, "the bridge must not add tokens of its own"

def test_a_missing_vocabulary_is_no_error(shelf):
    (shelf / "native" / "tokenizer.json").unlink()
    model = load_model("native", device="cpu")
    assert model.tokenizer is None and model(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, 6)

def test_new_model_leaves_the_global_generators_alone():
    for architecture in (GPT2, NATIVE):
        torch.manual_seed(3); before = torch.get_rng_state()
        new_model(architecture, 0)
        assert torch.equal(before, torch.get_rng_state())

@pytest.mark.parametrize("missing", [key for key in NATIVE if key != "class"])
def test_attention_only_needs_all_six_numbers(missing):
    refuse(lambda: new_model({key: value for key, value in NATIVE.items() if key != missing}, 0), missing)


# damaged folders

@pytest.mark.parametrize("name", ["gpt/seed0", "native"])
def test_truncated_weights(shelf, name):
    path = shelf / name / "model.safetensors"
    content = path.read_bytes()
    for size in (0, 1, 7, 8, 9, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        refuse(lambda: load_model(name), "model.safetensors", "fetch it again")
    path.write_bytes(content + b"x")
    refuse(lambda: load_model(name), "model.safetensors")

@pytest.mark.parametrize("header", [b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F16"}}', b"\xff\xfe", b'{"a": {"dtype": "F16", "shape": [9], "data_offsets": [0, 0]}}'])
def test_damaged_header(shelf, header):
    (shelf / "native" / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    refuse(lambda: load_model("native"), "native")

@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_a_pickle_is_never_opened(shelf, tmp_path, write, file):
    (shelf / "gpt/seed0" / "model.safetensors").unlink()
    write({"weight": Bomb(tmp_path / "bang")}, shelf / "gpt/seed0" / file)
    refuse(lambda: load_model("gpt/seed0"), file, "run code")
    assert not (tmp_path / "bang").exists()

def test_pieces_missing(shelf):
    (shelf / "native" / "model.safetensors").unlink()
    refuse(lambda: load_model("native"), "no model.safetensors")
    (shelf / "gpt/seed0" / "config.json").unlink()
    refuse(lambda: load_model(shelf / "gpt/seed0"), "no config.json")

@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"architectures": []}', '{"architectures": "GPT2LMHeadModel"}', '{"architectures": [3]}'])
def test_damaged_config(shelf, text):
    (shelf / "native" / "config.json").write_text(text)
    refuse(lambda: load_model("native"), "config.json")

@pytest.mark.parametrize("name", ["NoSuchClass", "AutoConfig", "pipeline", "__doc__"])
def test_a_class_that_is_no_model(shelf, name):
    edit_config(shelf / "gpt/seed0", architectures=[name])
    refuse(lambda: load_model("gpt/seed0"), name)

@pytest.mark.parametrize("change, word", [({"n_embd": 32}, "shape"), ({"n_layer": 3}, "lacks"), ({"n_head": 5}, "cannot load"),
                                          ({"n_embd": "wide"}, "cannot load"), ({"vocab_size": 7}, "shape")])
def test_weights_of_another_hugging_face_model(shelf, change, word):
    edit_config(shelf / "gpt/seed0", **change)
    refuse(lambda: load_model("gpt/seed0"), word, "gpt/seed0")

@pytest.mark.parametrize("change", [{"d_model": 32}, {"n_layers": 3}, {"n_layers": 1}, {"d_head": 0}, {"n_heads": "two"}, {"d_vocab": ...}, {"d_mlp": 4}])
def test_weights_of_another_attention_only_model(shelf, change):
    edit_config(shelf / "native", **change)
    refuse(lambda: load_model("native"))

def test_one_weight_lost(shelf):
    path = shelf / "gpt/seed0" / "model.safetensors"
    weights = load_file(path)
    del weights["transformer.h.1.mlp.c_fc.weight"]
    save_file(weights, path, metadata={"format": "pt"})
    refuse(lambda: load_model("gpt/seed0"), "transformer.h.1.mlp.c_fc.weight")

def test_damaged_or_foreign_tokenizer(shelf):
    path = shelf / "native" / "tokenizer.json"
    path.write_text("{}")
    refuse(lambda: load_model("native"), "tokenizer.json")
    path.write_text(char_tokenizer("abcdefghij").backend_tokenizer.to_str())
    refuse(lambda: load_model("native"), "10 tokens", "6")


# saving

def snapshot(folder): return {path.name: path.read_bytes() for path in folder.iterdir()}

def test_a_full_disk_leaves_the_old_checkpoint(shelf, monkeypatch):
    before, siblings = snapshot(shelf / "native"), sorted(os.listdir(shelf))
    def full(descriptor): raise OSError(28, "No space left on device")
    monkeypatch.setattr(models.os, "fsync", full)
    refuse(lambda: save_model(new_model(NATIVE, 1), None, shelf / "native"), "No space left")
    assert snapshot(shelf / "native") == before and sorted(os.listdir(shelf)) == siblings

@pytest.mark.parametrize("training", [{"loss": float("nan")}, {"loss": object()}])
def test_a_record_that_is_no_json_writes_nothing(shelf, training):
    before = snapshot(shelf / "native")
    refuse(lambda: save_model(new_model(NATIVE, 1), None, shelf / "native", training), "nothing was written")
    assert snapshot(shelf / "native") == before

def test_a_checkpoint_never_mixes_two_models(shelf):
    save_model(new_model(NATIVE, 1), None, shelf / "native")
    assert sorted(snapshot(shelf / "native")) == ["config.json", "model.safetensors"]

@pytest.mark.parametrize("call", [1, 2])
def test_a_renaming_that_fails_puts_the_old_model_back(shelf, monkeypatch, call):
    before, siblings, real, calls = snapshot(shelf / "native"), sorted(os.listdir(shelf)), os.rename, []
    def rename(source, target):
        calls.append(target)
        if len(calls) == call: raise OSError(5, "Input/output error")
        real(source, target)
    monkeypatch.setattr(models.os, "rename", rename)
    refuse(lambda: save_model(new_model(NATIVE, 1), None, shelf / "native"), "Input/output error")
    assert len(calls) >= call and snapshot(shelf / "native") == before and sorted(os.listdir(shelf)) == siblings

@pytest.mark.parametrize("name", ["thesis.txt", ".git"])
def test_a_folder_that_holds_more_than_a_model_is_left_alone(shelf, name):
    (shelf / "native" / name).mkdir()
    before = sorted(os.listdir(shelf / "native"))
    refuse(lambda: save_model(new_model(NATIVE, 1), None, shelf / "native"), name)
    assert sorted(os.listdir(shelf / "native")) == before

def test_what_save_refuses(shelf):
    refuse(lambda: save_model(load_model("native"), None, shelf / "again"), "bridge")
    refuse(lambda: save_model(new_model(NATIVE, 0), None, shelf / "again", dtype="int8"), "float16")
    (shelf / "file").write_text("")
    refuse(lambda: save_model(new_model(NATIVE, 0), None, shelf / "file"), "could not be written")

@pytest.mark.parametrize("dtype, exact", [("float16", False), ("bfloat16", False), ("float32", True)])
@pytest.mark.parametrize("architecture", [GPT2, GPT2 | {"tie_word_embeddings": False}, NATIVE,
    {"class": "Qwen3ForCausalLM", "vocab_size": 6, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
     "intermediate_size": 24, "max_position_embeddings": 16}])
def test_round_trip(tmp_path, architecture, dtype, exact):
    module, tokens = new_model(architecture, 0).eval(), torch.arange(12).view(2, 6) % 6
    with torch.no_grad():
        logits = forward_logits(module, tokens)
        model = load_model(save_model(module, None, tmp_path / "it", dtype=dtype), device="cpu")
        assert torch.allclose(model(tokens), logits, atol=1e-5 if exact else 3e-2, rtol=0)

def test_a_used_tokenizer_is_saved_without_padding_and_truncation(shelf):
    model = load_model("native", device="cpu")
    model.to_tokens(["To", "To be"])
    save_model(new_model(NATIVE, 0), model.tokenizer, shelf / "again")
    stored = json.loads((shelf / "again" / "tokenizer.json").read_text())
    assert stored["padding"] is None and stored["truncation"] is None and stored["added_tokens"] == []


# nanoGPT

ARGUMENTS = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 6, "vocab_size": 6, "bias": True, "dropout": 0.0}

def nanogpt_weights():
    "Random weights of nanoGPT's names and shapes; `attn.bias` is the mask that its older versions store."
    w, names = 8, {"transformer.wte.weight": (6, 8), "transformer.wpe.weight": (6, 8), "transformer.ln_f.weight": (8,), "transformer.ln_f.bias": (8,)}
    block = {"ln_1.weight": (w,), "ln_1.bias": (w,), "ln_2.weight": (w,), "ln_2.bias": (w,), "attn.c_attn.weight": (3 * w, w), "attn.c_attn.bias": (3 * w,), "attn.c_proj.weight": (w, w),
             "attn.c_proj.bias": (w,), "mlp.c_fc.weight": (4 * w, w), "mlp.c_fc.bias": (4 * w,), "mlp.c_proj.weight": (w, 4 * w), "mlp.c_proj.bias": (w,), "attn.bias": (1, 1, 6, 6)}
    weights = {name: torch.randn(shape) for name, shape in (names | {f"transformer.h.0.{name}": shape for name, shape in block.items()}).items()}
    return weights | {"lm_head.weight": weights["transformer.wte.weight"]}

def test_nanogpt_with_a_tokenizer_beside_it(tmp_path):
    torch.save({"model": nanogpt_weights(), "model_args": ARGUMENTS, "optimizer": {"state": {}}, "iter_num": 7}, tmp_path / "ckpt.pt")
    (tmp_path / "tokenizer.json").write_text(char_tokenizer(TEXT).backend_tokenizer.to_str())
    assert load_model(tmp_path / "ckpt.pt", device="cpu")("To be").shape == (1, 5, 6)

def test_nanogpt_files_that_are_none(tmp_path):
    path, weights = tmp_path / "ckpt.pt", nanogpt_weights()
    refuse(lambda: import_nanogpt(path), "no such file")
    def attempt(value, *words):
        torch.save(value, path)
        refuse(lambda: import_nanogpt(path), "ckpt.pt", *words)
    attempt([1, 2], "model_args")
    attempt({"model": weights}, "model_args")
    for key in ("n_layer", "vocab_size"): attempt({"model": weights, "model_args": ARGUMENTS | {key: None}}, key)
    attempt({"model": weights, "model_args": ARGUMENTS | {"n_head": 3}})
    attempt({"model": weights, "model_args": ARGUMENTS | {"block_size": 9}}, "wpe", "shape")
    attempt({"model": weights | {"transformer.extra": torch.ones(1)}, "model_args": ARGUMENTS}, "transformer.extra")
    attempt({"model": {name: w for name, w in weights.items() if "c_fc.weight" not in name}, "model_args": ARGUMENTS}, "c_fc.weight")
    attempt({"model": weights | {"transformer.wpe.weight": 3}, "model_args": ARGUMENTS}, "wpe")
    torch.save({"model": weights, "model_args": ARGUMENTS}, path)
    content = path.read_bytes()
    for size in (0, 10, len(content) // 2, len(content) - 10):
        path.write_bytes(content[:size])
        refuse(lambda: load_model(path), "ckpt.pt")

@pytest.mark.parametrize("legacy", [False, True])
def test_nanogpt_code_is_never_run(tmp_path, legacy):
    torch.save({"model": Bomb(tmp_path / "bang"), "model_args": ARGUMENTS}, tmp_path / "ckpt.pt", _use_new_zipfile_serialization=not legacy)
    refuse(lambda: load_model(tmp_path / "ckpt.pt"), "could run code")
    assert not (tmp_path / "bang").exists()


# llama2.c

NUMBERS = (16, 24, 2, 4, 2, 7, 8)

@pytest.fixture
def llama(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        arrays = [torch.randn(shape) for shape in models._llama2c_shapes(*NUMBERS).values()]
    (tmp_path / "model.bin").write_bytes(struct.pack("<7i", *NUMBERS) + b"".join(array.numpy().tobytes() for array in arrays))
    (tmp_path / "tok7.vocab").write_text("".join(f"{name}\t0\n" for name in ["<unk>", "<s>", "</s>", "▁", *"abc"]), encoding="utf-8")
    return tmp_path

def test_llama2c_survives_saving(llama):
    module, tokenizer = import_llama2c(llama / "model.bin", llama / "tok7.vocab")
    again = load_model(save_model(module, tokenizer, llama / "saved", dtype="float32"), device="cpu")
    direct = load_model(llama / "model.bin", device="cpu")
    assert again.to_tokens("a b\n").tolist() == direct.to_tokens("a b\n").tolist() == [[1, 4, 3, 5, 0]]
    assert again.to_tokens("ab", prepend_bos=False).tolist() == [[4, 5]]
    with torch.no_grad(): assert torch.allclose(again("a bc"), direct("a bc"), atol=1e-5)
    assert again.to_str_tokens("a b") == ["<s>", "a", " ", "b"]

def test_llama2c_lengths(llama):
    content = (llama / "model.bin").read_bytes()
    for size in (0, 27, 28, 100, len(content) - 4, len(content) - 1):
        (llama / "model.bin").write_bytes(content[:size])
        refuse(lambda: load_model(llama / "model.bin"), "model.bin", "truncated")
    (llama / "model.bin").write_bytes(content + bytes(4))
    refuse(lambda: load_model(llama / "model.bin"), "model.bin")

@pytest.mark.parametrize("place, value", [(0, 0), (0, -16), (0, 18), (1, 0), (2, 0), (2, 2**31 - 1), (3, 3), (3, 0), (4, 3), (4, 0), (5, 0), (6, 0), (0, 0x616B3432)])
def test_llama2c_implausible_headers(llama, place, value):
    content = bytearray((llama / "model.bin").read_bytes())
    struct.pack_into("<i", content, 4 * place, value)
    (llama / "model.bin").write_bytes(content)
    refuse(lambda: load_model(llama / "model.bin"), "model.bin")

def test_llama2c_weights_that_are_no_numbers(llama):
    content = bytearray((llama / "model.bin").read_bytes())
    struct.pack_into("<f", content, 100, float("nan"))
    (llama / "model.bin").write_bytes(content)
    refuse(lambda: load_model(llama / "model.bin"), "NaN")

@pytest.mark.parametrize("names", [["<unk>", "<s>", "</s>", "▁", "a", "b"], ["<unk>", "<s>", "</s>", "▁", "a", "b", "b"], ["<unk>", "<s>", "</s>", "▁", "a", "b", "th"],
                                   ["a", "b", "c", "d", "e", "f", "g"]])
def test_llama2c_vocabularies(llama, names):
    (llama / "tok7.vocab").write_text("".join(f"{name}\t0\n" for name in names), encoding="utf-8")
    refuse(lambda: load_model(llama / "model.bin"), "tok7.vocab")

def test_llama2c_vocabulary_files(llama):
    refuse(lambda: import_llama2c(llama / "model.bin", llama / "none.vocab"), "no such file")
    (llama / "tok8.vocab").write_bytes(b"\xff\xfe")
    refuse(lambda: import_llama2c(llama / "model.bin", llama / "tok8.vocab"), "UTF-8")
    refuse(lambda: load_model(llama / "model.bin"), "2 vocabularies")
    for path in llama.glob("*.vocab"): path.unlink()
    refuse(lambda: load_model(llama / "model.bin"), "0 vocabularies")


# the hub and names

@pytest.mark.parametrize("name", ["/no/such/folder", "a/b/c", "./here", "", "model.txt/", "two words"])
def test_names_that_the_hub_is_not_asked_about(shelf, name, monkeypatch):
    monkeypatch.setattr(models, "_hub_folder", lambda *_: pytest.fail("the hub was asked"))
    refuse(lambda: load_model(name), "gpt/seed0" if name else "")

HUB = """
import sys, time
from mechinterp_lib.models import load_model
from mechinterp_lib.core import InputError
start = time.time()
try: load_model("someone/no-such-model", device="cpu")
except InputError as error: print(error)
model = load_model("someone/tiny", device="cpu")
print(type(model).__name__, tuple(model(model.to_tokens("ab")).shape))
"""

def test_hub_names_through_the_cache(tmp_path):
    "A hub model that was downloaded before loads with no network; an unknown one is one line."
    from transformers import PreTrainedTokenizerFast
    from tokenizers import Tokenizer, models as kinds, pre_tokenizers
    cache = tmp_path / "hub" / "models--someone--tiny"
    commit = "0" * 40
    folder = cache / "snapshots" / commit
    new_model(GPT2 | {"bos_token_id": 0, "eos_token_id": 0}, 0).save_pretrained(folder)
    tokenizer = Tokenizer(kinds.WordLevel({"<|endoftext|>": 0, "a": 1, "b": 2}, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="a").save_pretrained(folder)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit)
    done = subprocess.run([sys.executable, "-c", HUB], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")})
    assert done.returncode == 0, done.stderr
    refusal, model = done.stdout.strip().splitlines()
    assert "someone/no-such-model" in refusal and "shipped models" in refusal
    assert model.startswith("TransformerBridge (1, ") and model.endswith(", 6)")

def test_importing_the_module_is_light():
    code = "import sys, mechinterp_lib.models; assert not {'torch', 'transformers', 'transformer_lens'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("unknown", ["[UNK]", None])
def test_a_tokenizer_of_whole_words(unknown, tmp_path):
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    from mechinterp_lib.data import encode
    from mechinterp_lib.models import token_ids
    words = {"<b>": 0, "v1": 1, "v2": 2, "k": 3} | ({unknown: 4} if unknown else {})
    raw = Tokenizer(models.WordLevel(words, **({"unk_token": unknown} if unknown else {})))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<b>", unk_token=unknown)
    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=8, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu")
    assert encode(model.tokenizer, "v1 v2 k").tolist() == [1, 2, 3] and token_ids(model, "v1 k")[0][0, -2:].tolist() == [1, 3]
    if unknown:
        with pytest.raises(InputError, match="'zz'"): encode(model.tokenizer, "v1 zz k")


@pytest.mark.parametrize("said, begin", [({"model_max_length": 1024}, "<|endoftext|>"), ({"model_max_length": 1024, "bos_token": None, "eos_token": "<|endoftext|>"}, None)])
def test_a_tokenizer_file_that_says_little(said, begin, tmp_path):
    "GPT-2's names no begin token, and its configuration does; Qwen's says that there is none."
    from tokenizers import Tokenizer, decoders, models as kinds, pre_tokenizers
    folder = tmp_path / "bytes"
    new_model({"class": "GPT2LMHeadModel", "vocab_size": 257, "n_positions": 24, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 256, "eos_token_id": 256}, 0).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(kinds.BPE({**{letter: i for i, letter in enumerate(letters)}, "<|endoftext|>": 256}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(said))
    model = load_model(folder, device="cpu")
    assert model.tokenizer.bos_token == begin and (model.to_tokens("hé")[0, 0].item() == 256) == (begin is not None) and model.to_tokens("hé").shape[1] == 3 + (begin is not None)
    (folder / "tokenizer_config.json").write_text("{")
    refuse(lambda: load_model(folder, device="cpu"), "tokenizer_config.json")


def test_a_download_that_the_disk_has_no_room_for(monkeypatch):
    from types import SimpleNamespace
    monkeypatch.setattr(models, "_cached", lambda name: None)
    monkeypatch.setattr(models, "_ask_hub", lambda name: SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors", size=10**18)], safetensors=SimpleNamespace(total=10)))
    refuse(lambda: load_model("someone/large", device="cpu"), "have to be downloaded")
