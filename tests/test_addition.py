"""The shipped addition models: what every seed answers, with weights of 16 bits, to sums that neither training nor the choice of a step has seen."""
import re
from functools import cache

import pytest

from mechinterp_lib.core import home, read_json
from mechinterp_lib.models import list_models
from mechinterp_lib.training import answer_scores, load_recipe, sums_of

FAMILIES = ("addition-gpt2", "addition-qwen")
SHIPPED = [name for name in list_models() if name.startswith("addition-")]
FINISHED = [name for name in SHIPPED if re.fullmatch(r"[\w-]+/seed\d+", name)]


@cache
def opened(name):
    "A model as plain transformers opens it, and what its record says."
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
    folder = home() / "models" / name
    return AutoModelForCausalLM.from_pretrained(folder), PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json")), read_json(folder / "training.json")


def exact(name, split, wording):
    module, tokenizer, record = opened(name)
    scores = answer_scores(module, tokenizer, sums_of(split), wording)
    for carry, share in scores.groupby("carry")["exact"].mean().items(): assert abs(share - record[split][wording][carry]["exact"]) < 0.01, "the record says something else"
    return scores["exact"].mean()


def test_no_seed_is_left_out():
    for family in FAMILIES:
        shipped = {name for name in SHIPPED if name.startswith(f"{family}/")}
        assert shipped == {f"{family}/seed{seed}{end}" for seed in range(10) for end in ("", "-early")}


@pytest.mark.parametrize("name", FINISHED)
def test_sums_kept_for_the_end_are_answered(name):
    for wording in ("question", "sum", "plus", "bare"): assert exact(name, "confirmation", wording) >= 0.999


@pytest.mark.parametrize("name", FINISHED)
def test_transformers_answers_greedily_and_stops(name):
    module, tokenizer, _ = opened(name)
    for prompt, answer in (("What is 23 + 54? Answer:", " 77\n"), ("96+57=", "153\n"), ("The sum of 45 and 54 is", " 99\n")):
        ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
        said = module.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
        assert tokenizer.decode(said[0, ids.shape[1]:]) == answer


@pytest.mark.parametrize("name", FINISHED)
def test_the_early_self_is_the_evaluation_nearest_to_one_half(name):
    log, early = opened(name)[2]["log"], opened(f"{name}-early")[2]
    nearest = min(log, key=lambda entry: abs(entry["validation_accuracy"] - 0.5))
    assert early["early_step"] == nearest["step"] and early["log"] == log[:log.index(nearest) + 1] and early["seed"] == opened(name)[2]["seed"]
    assert exact(f"{name}-early", "test", "bare") < 0.999


@pytest.mark.parametrize("name", SHIPPED)
def test_the_recipe_is_the_shipped_one(name):
    ours, theirs = vars(load_recipe(name.partition("/")[0])), opened(name)[2]["recipe"]
    assert {key: list(value) if isinstance(value, tuple) else value for key, value in ours.items()} == theirs and int(re.search(r"seed(\d+)", name)[1]) == opened(name)[2]["seed"]


@pytest.mark.parametrize("kind", ["GPT2LMHeadModel", "Qwen2ForCausalLM"])
def test_a_model_of_ones_own_that_is_never_right_gives_nothing_to_explain(kind, tmp_path, capsys):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    import torch, transformers
    from mechinterp_lib.cli import main
    from mechinterp_lib.data import addition_problems, spell
    bpe, spelled = Tokenizer(models.BPE()), spell(addition_problems())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    bpe.train_from_iterator(spelled["prompt"] + spelled["completion"], trainers.BpeTrainer(vocab_size=400, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    config = {"GPT2LMHeadModel": lambda: transformers.GPT2Config(vocab_size=400, n_positions=64, n_embd=32, n_layer=1, n_head=2),
              "Qwen2ForCausalLM": lambda: transformers.Qwen2Config(vocab_size=400, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64)}[kind]()
    torch.manual_seed(0)
    getattr(transformers, kind)(config).save_pretrained(tmp_path / "mine")
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(tmp_path / "mine")
    assert main(["run", "addition_circuits", "--model", str(tmp_path / "mine"), "--out", str(tmp_path / "out")]) == 2
    assert "nothing to explain" in capsys.readouterr().err and {path.name for path in (tmp_path / "out").iterdir()} == {"answers.csv", "accuracy.csv"}


def test_only_one_experiment_takes_a_model_of_ones_own(capsys):
    from mechinterp_lib.cli import main
    assert main(["run", "head_taxonomy", "--model", SHIPPED[0] if SHIPPED else "induction-2l/seed0"]) == 2 and "addition_circuits" in capsys.readouterr().err
