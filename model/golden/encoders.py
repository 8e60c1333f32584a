"""Golden sets 3, 5, 6 and 7: speech features, video autoencoder, text encoder, LoRA merge.

All dimensions come from the set's own files. Tolerances are the README's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import AutoFeatureExtractor

from conf.spec import TextEncoderSpec, VaeSpec
from model import lora, speech, tensors, text, vae
from model.checkpoint import fill
from model.files import read_json
from model.golden import Check, compare, present
from model.parts import Part

WAV2VEC2 = "wav2vec2_tiny"


def audio_features(folder: Path) -> list[Check]:
    stored, arguments = _read(folder, "audio_features")
    encoder = load_speech_encoder(folder / WAV2VEC2)
    waveform = stored["waveform"].numpy()
    states_LTC = encoder.hidden_states(waveform)
    features_LNC = speech.resample(stored["hidden_states"])

    def check(quantity: str, ours: Tensor, tolerance: float) -> Check:
        return compare("audio_features", quantity, ours, stored[quantity], tolerance)

    found = [
        check("input_values", encoder.normalised(waveform), 5e-5),
        check("hidden_states", states_LTC, 5e-5),
        check("features_30fps", features_LNC, 1e-6),
    ]
    for name, clip in arguments.items():
        if not isinstance(clip, dict):
            continue
        fps, clip_frames = clip["fps"], clip["batch_frames"]
        clips = speech.clip_count(features_LNC.shape[1], clip_frames, fps)
        found.append(Check("audio_features", f"num_repeat_{name}", abs(clips - clip["num_repeat"]), 0))
        frames = clips * clip_frames
        if f"indices_{name}" in stored:
            found.append(check(f"indices_{name}", torch.from_numpy(speech.bucket_indices(frames, fps)), 0))
        if f"embed_{name}" in stored:
            bucketed = speech.bucket(stored["features_30fps"], frames, fps)
            found.append(check(f"embed_{name}", bucketed[None], 1e-6))
            whole, recorded = encoder.features(waveform, frames, fps)[None], stored[f"embed_{name}"]
            found.append(compare("audio_features", f"embed_{name} from the waveform", whole, recorded, 5e-5))
    return found


def load_speech_encoder(folder: Path) -> speech.SpeechEncoder:
    path = folder / "model.safetensors"
    with torch.device("meta"):
        module = speech.build(read_json(folder / "config.json"))
    part = Part(module, (path,), speech.file_names(module, tensors.shapes(path)), unused=("lm_head.",))
    return speech.SpeechEncoder(fill(part, "cpu", "float32"), AutoFeatureExtractor.from_pretrained(folder))


def autoencoder(folder: Path) -> list[Check]:
    stored, arguments = _read(folder, "vae")
    model = load_vae(folder, arguments)

    def check(quantity: str, ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> Check:
        return compare("vae", quantity, ours, theirs, tolerance)

    found = [
        check("latents_mean", model.mean_C.flatten(), stored["latents_mean"], 0),
        check("latents_inv_std", 1 / model.std_C.flatten(), stored["latents_inv_std"], 1e-6),
        check("clip_latents", model.encode(stored["clip"]), stored["clip_latents"]),
    ]
    for name, latents in stored.items():
        if match := re.fullmatch(r"image_latents_(\d+)frames?", name):
            repeated = stored["image"].expand(-1, int(match[1]), -1, -1)
            found.append(check(name, model.encode(repeated), latents))
    decoded = model.stream().push(stored["latents"])
    stream = model.stream()
    pieces = [stream.push(piece) for piece in stored["latents"].split(arguments["stream_split"], dim=1)]
    found.append(check("decoded", decoded, stored["decoded"]))
    found.append(check("decoded in pieces, against whole", torch.cat(pieces, dim=1), decoded, 0))
    return found


def load_vae(folder: Path, arguments: dict[str, Any]) -> vae.Vae:
    """The set's autoencoder; `arguments` are those of its `vae.json`."""
    spec = VaeSpec(
        base_dim=arguments["dim"],
        z_dim=arguments["z_dim"],
        dim_mult=arguments["dim_mult"],
        num_res_blocks=arguments["num_res_blocks"],
        temperal_downsample=arguments["temperal_downsample"],
    )
    with torch.device("meta"):
        module = vae.build(spec)
    part = Part(module, (folder / "vae_weights.safetensors",), vae.upstream_names(module))
    return vae.Vae(fill(part, "cpu", "float32"))


def text_encoder(folder: Path) -> list[Check]:
    stored, arguments = _read(folder, "text_encoder")
    encoder = load_text_encoder(folder, arguments)
    with torch.inference_mode():
        padded = encoder.model(stored["input_ids"], attention_mask=stored["attention_mask"]).last_hidden_state
    found = [compare("text_encoder", "output, padded", padded, stored["output"], 2e-5)]
    for row, length in enumerate(stored["attention_mask"].sum(dim=1).tolist()):
        ours = encoder.encode_ids(stored["input_ids"][row, :length])
        theirs = stored["output"][row, :length]
        found.append(compare("text_encoder", f"output of {length} tokens", ours, theirs, 2e-5))
    return found


def load_text_encoder(folder: Path, arguments: dict[str, Any]) -> text.TextEncoder:
    """The set's encoder, which has no tokenizer; `arguments` are those of its `text_encoder.json`."""
    own_names = {"encoder_layers": "num_layers"}
    values = {own_names.get(name, name): value for name, value in arguments.items()}
    known = {field.name: values[field.name] for field in fields(TextEncoderSpec) if field.name in values}
    with torch.device("meta"):
        module = text.build(TextEncoderSpec(**known))
    part = Part(module, (folder / "text_encoder_weights.safetensors",), text.upstream_names(module))
    return text.TextEncoder(
        fill(part, "cpu", "float32"), tokenizer=Tokenizer(models.BPE()), text_len=arguments["text_len"]
    )


def lora_merge(folder: Path) -> list[Check]:
    stored, arguments = load_file(folder / "lora_merged.safetensors"), read_json(folder / "lora.json")
    base = folder / arguments["base_weights"]
    found, problems = lora.find(
        folder / "lora_prefixed.safetensors", arguments["alpha"], arguments["rank"], tensors.shapes(base)
    )
    expected = {f"{module}.weight" for module in arguments["modules"]}
    unmatched = len(problems) + len(expected ^ found.pairs.keys())
    checks, pairs = [Check("lora", f"{len(expected)} modules matched", unmatched, 0)], found.tensors()
    for name, weight in tensors.read(base, stored):
        ours = lora.merged(weight, pairs[name], found.scale)
        checks.append(compare("lora", name, ours, stored[name], 1e-6))
    return checks


SETS: dict[str, Callable[[Path], list[Check]]] = {
    "audio_features": audio_features,
    "vae": autoencoder,
    "text_encoder": text_encoder,
    "lora": lora_merge,
}


def checks(folder: Path) -> list[Check]:
    """All quantities of the sets that are there. Errors are those of the readers."""
    return [check for name in present(folder) if name in SETS for check in SETS[name](folder)]


def _read(folder: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    return load_file(folder / f"{name}.safetensors"), read_json(folder / f"{name}.json")
