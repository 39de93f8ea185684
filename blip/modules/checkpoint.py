"""Weights from files and into files: released `.pth`, transformers' folders, and our Lightning checkpoints.

- `read` takes any of the three and says which it was; files run no code and are not believed beyond their length
- `sizes` reads a model's config from the shapes; `load` fills a model strictly, position embeddings resized
- `convert` writes one layout from another; what became of each tensor stands in a `Report`
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from blip.files import whole, write_text
from blip.modules.blip import BLIPConfig
from blip.modules.med import MEDConfig
from blip.modules.names import (
    Tensors,
    from_released,
    from_transformers,
    listed,
    part,
    to_released,
    to_transformers,
)
from blip.modules.vit import ViTConfig, resize_position_embedding


@dataclass
class Report:
    """What became of each tensor; its text is for people, by part of the model."""

    title: str
    loaded: list[str] = field(default_factory=list)
    copied: dict[str, str] = field(default_factory=dict)  # name -> where to, besides
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)  # name -> why
    missing: dict[str, str] = field(default_factory=dict)  # name -> what it is instead

    def __str__(self) -> str:
        lines = [self.title]
        for words, names in _grouped((part(name), name) for name in self.loaded):
            lines.append(f"  loaded   {words}: {len(names)} tensor{'s' * (len(names) != 1)}")
        lines += [f"  resized  {name}: {how}" for name, how in self.resized.items()]
        for label, rows in (("copied ", self.copied), ("dropped", self.dropped), ("missing", self.missing)):
            for why, names in _grouped((why, name) for name, why in rows.items()):
                lines.append(f"  {label}  {listed(names)}: {why}")
        return "\n".join(lines)


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    groups: dict[str, list[str]] = {}
    for key, name in pairs:
        groups.setdefault(key, []).append(name)
    return list(groups.items())


@dataclass(frozen=True)
class Weights:
    """What a file holds: tensors under our names, and what else is needed to rebuild the model.

    layout: `released`, `transformers` or `blip`. config (YAML) and tokenizer (JSON) are texts, empty where the file has
    none. heads: of image encoder and text transformer, where the file says them. trained_on: digests of all shards that its
    weights have been trained on, as far as the file says.
    """

    path: Path
    layout: str
    tensors: Tensors
    dropped: dict[str, str]
    config: str = ""
    tokenizer: str = ""
    heads: tuple[int, int] | None = None
    trained_on: tuple[str, ...] = ()


# reading --------------------------------------------------------------------------------------------------------------


def read(path: str | Path) -> Weights:
    """The weights of a file (`.pth`, `.pt`, `.bin`, `.ckpt`, `.safetensors`), of a transformers folder, or of a run's folder.

    ValueError: not a file of the three layouts, damaged, or one that would need code to be read.
    """
    path = Path(path)
    if path.is_dir():
        last = path / "checkpoints" / "last.ckpt"
        return read(last) if last.is_file() else _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint")
    content = _content(path)
    tensors = _tensors(path, content)
    if any(name.startswith("model.visual_encoder.") for name in tensors):
        texts = {key: content[key] for key in ("config", "tokenizer") if isinstance(content.get(key), str)}
        seen = content.get("trained_on")
        trained_on = tuple(map(str, seen)) if isinstance(seen, list) else ()
        return Weights(path, "blip", tensors, {}, **texts, trained_on=trained_on)
    transformers = any(name.startswith("vision_model.") for name in tensors)
    try:
        ours, dropped = (from_transformers if transformers else from_released)(tensors)
    except (ValueError, RuntimeError) as error:  # torch's own where pieces of one tensor don't go together
        raise ValueError(f"{path}: {error}") from error
    if not any(part(name) == "image encoder" for name in ours):
        raise ValueError(f"{path}: no image encoder among its {len(tensors)} tensors, so no BLIP checkpoint")
    return Weights(path, "transformers" if transformers else "released", ours, dropped)


def _read_folder(folder: Path) -> Weights:
    found = [folder / name for name in ("model.safetensors", "pytorch_model.bin") if (folder / name).is_file()]
    if not found or not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: neither a run's folder (checkpoints/last.ckpt) nor transformers' (config.json and model.safetensors)"
        )
    weights = read(found[0])
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        vision, text = (int(config[side]["num_attention_heads"]) for side in ("vision_config", "text_config"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/config.json: no Blip config with num_attention_heads ({error!r})") from error
    tokenizer = folder / "tokenizer.json"
    words = tokenizer.read_text(encoding="utf-8") if tokenizer.is_file() else ""
    return Weights(folder, weights.layout, weights.tensors, weights.dropped, tokenizer=words, heads=(vision, text))


def _content(path: Path) -> dict[str, Any]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError(f"{path}: compressed records; torch.save stores them plainly")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(f"{path}: holds more than tensors and plain values, refused unread: {error}") from error
    except (RuntimeError, EOFError, OSError, LookupError, SafetensorError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path}: damaged or not a checkpoint: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of tensors")
    return content


def tensors_of(path: Path) -> Tensors:
    """The tensors of any weights file under their own names; errors as in `read`."""
    return _tensors(path, _content(path))


def _tensors(path: Path, content: dict[str, Any]) -> Tensors:
    for key in ("model", "state_dict"):  # where the released files and Lightning's put the weights
        content = content[key] if isinstance(content.get(key), dict) else content
    tensors = {str(name): value for name, value in content.items() if isinstance(value, Tensor)}
    size = path.stat().st_size
    for name, tensor in tensors.items():  # a few bytes can claim a tensor of any size, by a stride of 0
        if tensor.layout != torch.strided or tensor.is_meta or tensor.numel() * tensor.element_size() > size:
            raise ValueError(f"{path}: {name} of shape {list(tensor.shape)} is not stored in this file of {size} bytes")
    return tensors


# sizes ----------------------------------------------------------------------------------------------------------------


def sizes(
    tensors: Mapping[str, Tensor],
    heads: tuple[int, int] | None = None,
    dropout: float = 0.1,
    drop_path: float = 0.0,
) -> BLIPConfig:
    """The config that tensors (our names) fit, read from their shapes; what shapes don't show is as released.

    heads: of image encoder and text transformer, else width / 64. Which tensors encoder and decoder share is told by which
    of them are equal.
    """
    vit, text = "model.visual_encoder.", "model.med.encoder."
    if not any(name.startswith(text) for name in tensors):
        text = "model.med.decoder."

    def shape(name: str) -> torch.Size:
        if name not in tensors:
            raise ValueError(f"{name} is missing, so the model's sizes cannot be read")
        return tensors[name].shape

    def depth(prefix: str) -> int:
        numbers = {int(name.removeprefix(prefix).split(".")[0]) for name in tensors if name.startswith(prefix)}
        if numbers != set(range(len(numbers))) or not numbers:
            raise ValueError(f"{prefix}…: blocks {sorted(numbers)[:8]} are not numbered from 0 without gaps")
        return len(numbers)

    def head_count(width: int, side: int) -> int:
        if heads is None and width % 64:
            raise ValueError(f"a width of {width} is no multiple of 64: give the numbers of heads")
        return width // 64 if heads is None else heads[side]

    _, tokens, width = shape(f"{vit}pos_embed")
    convolutions = sum(name.startswith(f"{vit}patch_embed.convolutions.") for name in tensors) // 2
    patch = 2**convolutions if convolutions else shape(f"{vit}patch_embed.proj.weight")[-1]
    text_width = shape(f"{text}0.self_attention.out.weight")[0]
    vocabulary = shape("model.med.embeddings.word.weight")[0]
    look = f"{text}0.cross_attention."
    look += "halves.0." if f"{look}halves.0.key_value.weight" in tensors else ""  # NLVR2's twin
    projection = tensors.get("model.vision_proj.weight")
    temperature = tensors.get("model.temperature")
    return BLIPConfig(
        vit=ViTConfig(
            image_size=round((tokens - 1) ** 0.5) * patch,
            patch_size=patch,
            width=width,
            depth=depth(f"{vit}blocks."),
            heads=head_count(width, 0),
            drop_path=drop_path,
            stem="conv" if convolutions else "patch",
            mlp_ratio=shape(f"{vit}blocks.0.mlp.fc1.weight")[0] / width,
        ),
        med=MEDConfig(
            vocab_size=vocabulary,
            width=text_width,
            depth=depth(text),
            heads=head_count(text_width, 1),
            mlp_width=shape(f"{text}0.feed_forward.fc1.weight")[0],
            positions=shape("model.med.embeddings.position.weight")[0],
            look_width=shape(f"{look}key_value.weight")[1],
            share=_share(tensors),
            dropout=dropout,
            attention_dropout=dropout,
        ),
        embed_width=256 if projection is None else projection.shape[0],
        temperature=0.07 if temperature is None else float(temperature),
        dec_id=vocabulary - 2,
        enc_id=vocabulary - 1,
    )


def _share(tensors: Mapping[str, Tensor]) -> str:
    def equal(module: str) -> bool:
        pairs = [
            (tensor, tensors.get(name.replace("model.med.encoder.", "model.med.decoder.")))
            for name, tensor in tensors.items()
            if name.startswith("model.med.encoder.") and f".{module}." in name
        ]
        return all(b is not None and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)

    if not any(name.startswith("model.med.decoder.0.") for name in tensors):
        return "all_but_sa"
    if not any(name.startswith("model.med.encoder.0.") for name in tensors):
        return "all_but_sa"
    same = {module: equal(module) for module in ("self_attention", "cross_attention", "feed_forward")}
    word = "model.med.{}.word.weight"
    embeddings = torch.equal(tensors[word.format("embeddings")], tensors[word.format("decoder_embeddings")])
    if not same["feed_forward"] or not embeddings:
        return "none"
    names = {(True, True): "all", (False, True): "all_but_sa", (True, False): "all_but_ca"}
    return names.get((same["self_attention"], same["cross_attention"]), "none")


# loading --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load(
    module: nn.Module, weights: Weights, prefix: str = "model.", spare: Collection[str] = ("temperature",)
) -> Report:
    """Fills a `BLIP` (or, with prefix `momentum.`, its momentum encoder) and says what came from where.

    Strict: ValueError where the file lacks a part that the module has (unless named in `spare`, see `names.part`), where
    shapes differ, where a part has tensors too many, or where tensors differ that the module ties. Position embeddings of
    the image encoder are resized. Parts that only the file has are left out.
    """
    report = Report(f"{weights.path} ({weights.layout} layout)", dropped=dict(weights.dropped))
    own = {prefix + name: tensor for name, tensor in module.state_dict().items()}
    given = {name: tensor for name, tensor in weights.tensors.items() if name.startswith(prefix)}
    if not any(name.startswith("model.med.encoder.") for name in own):  # a decoder alone has one set of embeddings
        alias = {n: n.replace("decoder_embeddings", "embeddings") for n in given if ".decoder_embeddings." in n}
        given.update({other: given[name] for name, other in alias.items()})
    parts = {part(name) for name in own}
    report.dropped.update(
        {n: f"this model has no {part(n)}" for n in weights.tensors if n not in own and part(n) not in parts}
    )

    lacking = sorted({part(n) for n in own} - {part(n) for n in given} - set(spare))
    if lacking:
        raise ValueError(f"{weights.path} has no {', no '.join(lacking)}, which this task needs")
    problems = [f"{n} is missing" for n in own if n not in given and part(n) not in spare]
    problems += [f"{n} is one too many" for n in given if n not in own and part(n) in parts]
    filled: dict[int, str] = {}
    for name, target in own.items():
        if name not in given:
            report.missing[name] = f"the {part(name)} keeps its start values"
            continue
        source = given[name]
        if name.endswith("visual_encoder.pos_embed") and source.shape != target.shape and source.dim() == 3:
            grid = round((target.shape[1] - 1) ** 0.5)
            report.resized[name] = f"{source.shape[1] - 1} -> {grid * grid} patches"
            source = resize_position_embedding(source, grid)
        if source.shape != target.shape:
            problems.append(f"{name} has shape {list(source.shape)}, the model {list(target.shape)}")
        elif (first := filled.setdefault(target.data_ptr(), name)) != name and not torch.equal(given[first], source):
            problems.append(f"{name} differs from {first}, which the model ties to it: choose another model.med.share")
        elif not problems:
            target.copy_(source)
            report.loaded.append(name)
    if problems:
        more = f"\n  and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise ValueError(f"{weights.path} does not fit the model:\n  " + "\n  ".join(problems[:12]) + more)
    return report


# converting -----------------------------------------------------------------------------------------------------------


def convert(
    source: str | Path,
    destination: str | Path,
    to: str,
    task: str | None = None,
    tokenizer: str = "",
    heads: tuple[int, int] | None = None,
) -> Report:
    """Writes the weights of `source` in another layout and reports what went over and what could not.

    to: `released` (a `.pth`; task one of `names.RELEASED`), `transformers` (a folder; task one of `names.TRANSFORMERS`) or
    `blip` (a checkpoint that rebuilds its model; needs the tokenizer's JSON where the source has none).
    """
    weights, destination = read(source), Path(destination)
    heads = heads or weights.heads
    dropped = dict(weights.dropped)
    if to == "released":
        tensors, left = to_released(weights.tensors, task or "pretrain")
        with whole(destination) as path:
            torch.save({"model": tensors}, path)
    elif to == "transformers":
        task = task or "BlipForConditionalGeneration"
        tensors, left = to_transformers(weights.tensors, task)
        destination.mkdir(parents=True, exist_ok=True)
        config = json.dumps(_transformers_config(sizes(weights.tensors, heads), task), indent=2)
        own = {name: t for name, t in tensors.items() if not name.startswith("text_decoder.cls.predictions.decoder.")}
        with whole(destination / "model.safetensors") as path:
            save_file(own, path, {"format": "pt"})
        write_text(destination / "config.json", config)
        if text := tokenizer or weights.tokenizer:
            write_text(destination / "tokenizer.json", text)
    elif to == "blip":
        tensors, left = weights.tensors, {}
        text = tokenizer or weights.tokenizer
        if not text:
            raise ValueError(f"{source} holds no tokenizer: give the vocabulary that its model was trained with")
        yaml = weights.config or json.dumps({"model": nodes(sizes(tensors, heads))}, indent=2)  # JSON is YAML
        content = {"state_dict": tensors, "config": yaml, "tokenizer": text, "trained_on": list(weights.trained_on)}
        with whole(destination) as path:
            torch.save(content, path)
    else:
        raise ValueError(f"unknown layout {to!r}; choose released, transformers or blip")
    loaded = [name for name in weights.tensors if name not in left]
    title = f"{source} ({weights.layout}) -> {destination} ({to}{', ' + task if task else ''})"
    return Report(title, loaded, dropped=dropped | left)


def nodes(config: BLIPConfig) -> dict[str, Any]:
    """The config nodes that `blip_config` makes this config of, given the vocabulary."""
    tree = asdict(config)
    for name in ("dec_id", "enc_id"):
        del tree[name]
    for name in ("vocab_size", "look_width"):
        del tree["med"][name]
    return tree


def blip_config(model: Mapping[str, Any], vocab_size: int, dec_id: int, enc_id: int) -> BLIPConfig:
    """The sizes of a model from its config nodes (`conf/model`) and its vocabulary; the other way of `nodes`."""
    vit = ViTConfig(**model["vit"])
    med = MEDConfig(**model["med"], vocab_size=vocab_size, look_width=vit.width)
    rest = {name: value for name, value in model.items() if name not in ("vit", "med")}
    return BLIPConfig(vit=vit, med=med, dec_id=dec_id, enc_id=enc_id, **rest)


def _transformers_config(config: BLIPConfig, task: str) -> dict[str, Any]:
    vit, med = config.vit, config.med
    return {
        "architectures": [task],
        "model_type": "blip",
        "projection_dim": config.embed_width,
        "image_text_hidden_size": config.embed_width,
        "tie_word_embeddings": True,
        "vision_config": {
            "hidden_size": vit.width,
            "intermediate_size": round(vit.width * vit.mlp_ratio),
            "num_hidden_layers": vit.depth,
            "num_attention_heads": vit.heads,
            "image_size": vit.image_size,
            "patch_size": vit.patch_size,
            "layer_norm_eps": 1e-6,
        },
        "text_config": {
            "vocab_size": med.vocab_size,
            "hidden_size": med.width,
            "encoder_hidden_size": med.look_width,
            "intermediate_size": med.mlp_width,
            "num_hidden_layers": med.depth,
            "num_attention_heads": med.heads,
            "max_position_embeddings": med.positions,
            "layer_norm_eps": med.norm_eps,
            "hidden_dropout_prob": med.dropout,
            "attention_probs_dropout_prob": med.attention_dropout,
            "bos_token_id": config.dec_id,
        },
    }
