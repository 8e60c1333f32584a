"""Golden sets 3, 5, 6 and 7: speech features, video autoencoder, text encoder, LoRA merge.

All dimensions come from the set's own files. Tolerances are the README's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoFeatureExtractor

from model import lora, speech, tensors, text, vae
from model.checkpoint import fill
from model.files import read_json
from model.golden import Check
from model.parts import Part
from model.spec import TextEncoderSpec, VaeSpec

WAV2VEC2 = "wav2vec2_tiny"


def checks(folder: Path) -> list[Check]:
    """Every set of this module whose tensors are in the folder."""
    sets: dict[str, Callable[[Path], list[Check]]] = {
        "audio_features": audio_features,
        "vae": autoencoder,
        "text_encoder": text_encoder,
        "lora_merged": lora_merge,
    }
    return [
        check for name, run in sets.items() if (folder / f"{name}.safetensors").is_file() for check in run(folder)
    ]


def audio_features(folder: Path) -> list[Check]:
    stored, arguments = load_file(folder / "audio_features.safetensors"), read_json(folder / "audio_features.json")
    encoder = load_speech_encoder(folder / WAV2VEC2)
    waveform = stored["waveform"].numpy()
    states_LTC = encoder.hidden_states(waveform)
    features_LNC = speech.resample(stored["hidden_states"])

    def check(quantity: str, ours: Tensor, tolerance: float) -> Check:
        return Check("audio_features", quantity, difference(ours, stored[quantity]), tolerance)

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
            whole = difference(encoder.features(waveform, frames, fps)[None], stored[f"embed_{name}"])
            found.append(Check("audio_features", f"embed_{name} from the waveform", whole, 5e-5))
    return found


def load_speech_encoder(folder: Path) -> speech.SpeechEncoder:
    path = folder / "model.safetensors"
    with torch.device("meta"):
        module = speech.build(read_json(folder / "config.json"))
    part = Part(module, (path,), speech.file_names(module, tensors.shapes(path)), unused=("lm_head.",))
    return speech.SpeechEncoder(fill(part, "cpu", "float32"), AutoFeatureExtractor.from_pretrained(folder))


def autoencoder(folder: Path) -> list[Check]:
    stored, arguments = load_file(folder / "vae.safetensors"), read_json(folder / "vae.json")
    model = load_vae(folder, arguments)

    def check(quantity: str, ours: Tensor, theirs: Tensor, tolerance: float = 2e-5) -> Check:
        return Check("vae", quantity, difference(ours, theirs), tolerance)

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
    stored, arguments = load_file(folder / "text_encoder.safetensors"), read_json(folder / "text_encoder.json")
    encoder = load_text_encoder(folder, arguments)
    with torch.inference_mode():
        padded = encoder.model(stored["input_ids"], attention_mask=stored["attention_mask"]).last_hidden_state
    found = [Check("text_encoder", "output, padded", difference(padded, stored["output"]), 2e-5)]
    for row, length in enumerate(stored["attention_mask"].sum(dim=1).tolist()):
        ours = encoder.encode_ids(stored["input_ids"][row, :length])
        theirs = stored["output"][row, :length]
        found.append(Check("text_encoder", f"output of {length} tokens", difference(ours, theirs), 2e-5))
    return found


def load_text_encoder(folder: Path, arguments: dict[str, Any]) -> text.TextEncoder:
    """The set's encoder, which has no tokenizer; `arguments` are those of its `text_encoder.json`."""
    own_names = {"encoder_layers": "num_layers"}
    known = TextEncoderSpec.__dataclass_fields__
    values = {own_names.get(name, name): value for name, value in arguments.items()}
    with torch.device("meta"):
        module = text.build(TextEncoderSpec(**{name: value for name, value in values.items() if name in known}))
    part = Part(module, (folder / "text_encoder_weights.safetensors",), text.upstream_names(module))
    return text.TextEncoder(fill(part, "cpu", "float32"), tokenizer=None, text_len=arguments["text_len"])


def lora_merge(folder: Path) -> list[Check]:
    stored, arguments = load_file(folder / "lora_merged.safetensors"), read_json(folder / "lora.json")
    base = folder / arguments["base_weights"]
    found, problems = lora.find(
        folder / "lora_prefixed.safetensors", arguments["alpha"], arguments["rank"], tensors.shapes(base)
    )
    expected = {f"{module}.weight" for module in arguments["modules"]}
    unmatched = len(problems) + len(expected ^ found.pairs.keys())
    weights, pairs = dict(tensors.read(base, stored)), found.tensors()
    return [
        Check("lora", f"{len(expected)} modules matched", unmatched, 0),
        *(
            Check("lora", name, difference(lora.merged(weights[name], pairs[name], found.scale), merged), 1e-6)
            for name, merged in stored.items()
        ),
    ]


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite where shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    return (ours - theirs).abs().max().item()
