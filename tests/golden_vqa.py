"""The golden case `vqa`: the training loss with its gradients, ranked answers, generated answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from blip.layout import TextLayout
from blip.modules.checkpoint import load
from blip.modules.generation import Decoding, generate
from blip.modules.vqa import VQA, Candidates, rank
from blip.text import Tokenizer, clean_question
from tests import golden_models as golden

SMOOTHING = 0.1
AT_ONCE = 8  # answers decoded together: fewer than there are, so that the parts of a ranking are put together
BEAM = Decoding(
    **{"strategy": "beam", "beams": 3, "max_length": 10, "min_length": 1, "length_counts": "all", "samples": 1},
    **{"top_p": 1.0, "top_k": 0, "temperature": 1.0, "length_penalty": 1.0},
    **{"repetition_penalty": 1.0, "no_repeat_ngram": 0},
)


def run_vqa(
    out: Any,
    folder: Path,
    case: dict[str, Any],
    tensors: dict[str, Tensor],
    inputs: dict[str, Tensor],
    dtype: torch.dtype,
) -> None:
    weights = golden._weights(folder, tensors)
    model = VQA(golden._config(case, weights)).to(dtype).eval()
    load(model, weights)
    tokenizer = Tokenizer.load(folder / case["vocab_file"])
    questions = [clean_question(text, 50) for text in case["questions"]]
    for name, texts, longest in (
        ("question", questions, case["train"]["question_max_length"]),
        ("answer", case["answers"], 512),
        ("candidates", case["rank"]["candidates"], 512),
    ):
        ids = inputs[f"{name}.input_ids"]
        ids = ids.masked_fill(ids == model.config.dec_id, tokenizer.cls_id)  # the candidates already begin with [DEC]
        if not torch.equal(golden._ids(folder, case, texts, longest, ids.shape[1]), ids):
            raise ValueError(f"{folder}: the texts of {name} give other ids than the folder's")

    packed, layout = golden._texts(inputs["question.input_ids"], inputs["question.attention_mask"])
    pictures = model.med.look(model.image_states(inputs["image"].to(dtype)))
    looked = model.ask(packed, layout, pictures)

    answers, grid = golden._texts(inputs["answer.input_ids"], inputs["answer.attention_mask"])
    each = [kv.select(torch.arange(len(case["n"])).repeat_interleave(inputs["n"])) for kv in looked]
    losses = model.answer_losses(answers, grid, each, SMOOTHING)
    loss = (inputs["weights"].to(dtype) * losses).sum() / inputs["image"].shape[0]
    loss.backward()
    gradients = golden._gradients(model)
    with torch.no_grad():
        logits = grid.pad(model.med.lm_head(model.lm_states(answers, grid, each)))
    out.tensors = {
        "train.loss": loss,
        "train.answer_losses": losses,
        "train.logits": logits,
        "train.digest.grad": golden.digest(gradients, case["digest_names"]["grad"]),
        **{f"train.grad.{name}": gradient for name, gradient in gradients.items()},
    }
    out.masks = {"train.logits": (inputs["answer.attention_mask"].bool(), golden.PADDED)}

    lengths = inputs["candidates.attention_mask"].sum(1)
    _rank(out, folder, case, model, looked, Candidates(inputs["candidates.input_ids"], lengths))
    written = _write(model, inputs, pictures, tokenizer)
    told = case["generate"]["hypothesis_scores"]
    tolerance = {torch.float64: 1e-8, torch.float32: 1e-4}[dtype]
    near = torch.allclose(
        written.score.double(), torch.tensor(told, dtype=torch.float64), rtol=tolerance, atol=tolerance
    )
    out.lists |= {
        "questions": case["questions"],  # their ids were compared above, and those of the answers
        "answers": case["answers"],
        "rank.candidates": case["rank"]["candidates"],
        "n": inputs["n"].tolist(),
        "weights": [round(weight, 6) for weight in inputs["weights"].tolist()],
        "generate.ids": written.ids.tolist(),
        "generate.texts": [tokenizer.decode(row) for row in written.ids.tolist()],
        "generate.hypothesis_scores": told if near else written.score.tolist(),
        "tied_groups": golden._same_groups(golden._tied(model, tensors), case["tied_groups"]),
        "parameters_without_gradient": sorted(set(case["digest_names"]["grad"]) - set(gradients)),
    }
    out.reasons |= golden.USED | {
        "digest_names": "names of rows",
        "zero_gradient_parameters": "names of what float32 leaves out",
        "generate_f32_scores": "a float32 run's: ours is held against the float64 scores",
        "rank.topk_scores_without_smoothing": "not what the released code ranks by",
    }


def _rank(out: Any, folder: Path, case: dict[str, Any], model: VQA, looked: list, candidates: Candidates) -> None:
    """The ranking, its candidates put in the folder's order, in which equal first tokens are as they fell."""
    everyone = len(case["rank"]["candidates"])
    made = rank(model, looked, candidates, case["rank"]["k_test"], AT_ONCE, SMOOTHING)
    whole = rank(model, looked, candidates, everyone, AT_ONCE, SMOOTHING)
    with torch.no_grad():
        start = TextLayout.from_lengths([1] * len(case["questions"]))
        opening = torch.full((start.rows,), model.config.dec_id)
        logits = model.med.lm_head(model.med.decode(opening, start, looked))
    name = "f64.safetensors" if (folder / "f64.safetensors").exists() else "f32.safetensors"
    wanted = load_file(folder / name)["rank.topk_ids"]
    order = (made.chosen[:, None] == wanted[..., None]).byte().argmax(2)  # [q, k]: where theirs stand with us
    out.tensors |= {
        "rank.first_token_logits": logits,
        "rank.prob_first_token": torch.zeros_like(whole.first).scatter(1, whole.chosen, whole.first),
        "rank.topk_probs": made.first.gather(1, order),
        "rank.topk_ids": made.chosen.gather(1, order),
        "rank.topk_scores": made.scores.gather(1, order),
        "rank.answer_ids": made.best,
    }
    out.lists |= {
        "rank.answer_ids": made.best.tolist(),
        "rank.answers": [case["rank"]["candidates"][number] for number in made.best.tolist()],
    }


def _write(model: VQA, inputs: dict[str, Tensor], pictures: list, tokenizer: Tokenizer) -> Any:
    """What the released `generate` writes: it looks at the padding of questions as well."""
    ids, mask = inputs["question.input_ids"], inputs["question.attention_mask"].bool()
    everywhere = TextLayout.from_mask(mask)
    asked = ids.index_fill(1, torch.tensor([0]), model.config.enc_id).flatten()
    with torch.no_grad():
        states = model.med.encode(asked, everywhere, pictures).unflatten(0, mask.shape)
        looked = model.med.look(states, torch.ones_like(mask), decoder=True)
    return generate(model.med, looked, [model.config.dec_id], BEAM, tokenizer.sep_id, tokenizer.pad_id)
