"""The speech encoder: wav2vec2 from transformers, every layer of it, brought to the video's frame rate.

Shapes: L hidden states (one more than layers), T wav2vec2 frames at 50 Hz, N features at 30 Hz, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Wav2Vec2Config, Wav2Vec2Model

SAMPLE_RATE = 16_000
WAV2VEC2_HZ = 50
FEATURE_HZ = 30
"""Features are brought to 30 Hz before they are assigned to frames, whatever the video's frame rate."""


def build(config: dict[str, Any]) -> Wav2Vec2Model:
    """The encoder that a `config.json` describes; on the default device, with the library's initial
    weights.
    """
    return Wav2Vec2Model(Wav2Vec2Config.from_dict(config))


_WEIGHT_NORM = {
    "parametrizations.weight.original0": "weight_g",
    "parametrizations.weight.original1": "weight_v",
}


def file_names(model: Wav2Vec2Model, present: Iterable[str]) -> dict[str, str]:
    """Parameter name -> name in a checkpoint that holds the names `present`.

    Published files hold the CTC model, whose encoder lies under `wav2vec2.`, and older ones write the weight
    norm of the positional convolution as `weight_g` and `weight_v`.
    """
    names = set(present)
    prefix = "wav2vec2." if any(name.startswith("wav2vec2.") for name in names) else ""
    old = any(name.endswith(".weight_g") for name in names)

    def file_name(name: str) -> str:
        if old:
            for new_suffix, old_suffix in _WEIGHT_NORM.items():
                name = name.replace(new_suffix, old_suffix)
        return prefix + name

    return {name: file_name(name) for name in model.state_dict()}


def resample(states_LTC: Tensor) -> Tensor:
    """50 Hz -> 30 Hz, [L, T, C] -> [L, N, C] with N = int(T / 50 * 30), linear between the ends."""
    length = int(states_LTC.shape[1] / WAV2VEC2_HZ * FEATURE_HZ)
    if length == 0:
        return states_LTC[:, :0]
    states_LCT = states_LTC.transpose(1, 2)
    return nn.functional.interpolate(states_LCT, size=length, mode="linear", align_corners=True).transpose(
        1, 2
    )


def bucket_indices(frames: int, fps: int) -> np.ndarray:
    """Which 30 Hz feature each of `frames` video frames takes: int64 [frames], half-way points to the even
    one.
    """
    seconds = np.linspace(0, frames / fps, frames, endpoint=False)
    last = math.ceil(frames / fps * FEATURE_HZ) - 1
    return np.clip(np.round(seconds * FEATURE_HZ).astype(np.int64), 0, last)


def bucket(features_LNC: Tensor, frames: int, fps: int) -> Tensor:
    """30 Hz features [L, N, C] -> [L, C, frames]; frames beyond the sound are zeros, as upstream fills
    them.
    """
    indices = torch.from_numpy(bucket_indices(frames, fps)).to(features_LNC.device)
    heard = indices < features_LNC.shape[1]
    out_LCF = features_LNC.new_zeros(features_LNC.shape[0], features_LNC.shape[2], frames)
    out_LCF[:, :, heard] = features_LNC[:, indices[heard]].transpose(1, 2)
    return out_LCF


def clip_count(features: int, batch_frames: int, fps: int) -> int:
    """Clips of `batch_frames` frames that upstream makes of `features` 30 Hz features: one more than are
    full.
    """
    return int(features / (batch_frames * FEATURE_HZ / fps)) + 1


class SpeechEncoder:
    """A loaded wav2vec2 with its feature extractor, which normalises the waveform if the checkpoint says
    so.
    """

    def __init__(self, model: Wav2Vec2Model, feature_extractor: Any) -> None:
        self.model = model
        self.feature_extractor = feature_extractor
        self.layers: int = model.config.num_hidden_layers + 1
        self.dim: int = model.config.hidden_size

    def normalised(self, samples: np.ndarray) -> Tensor:
        """16 kHz mono float32 [n] -> [1, n] as the model takes it: zero mean and unit variance."""
        return self.feature_extractor(samples, sampling_rate=SAMPLE_RATE, return_tensors="pt").input_values

    @torch.inference_mode()
    def hidden_states(self, samples: np.ndarray) -> Tensor:
        """16 kHz mono float32 [n], n >= 400 -> [L, T, C] float32 at 50 Hz, on the encoder's device.

        The input of the first layer, the outputs of all but the last, and the last one's after the encoder's
        final LayerNorm, which transformers 5 leaves out of `hidden_states[-1]`.
        """
        inputs = self.normalised(samples).to(self.model.device, self.model.dtype)
        out = self.model(inputs, output_hidden_states=True)
        return torch.cat([*out.hidden_states[:-1], out.last_hidden_state]).float()

    def features(self, samples: np.ndarray, frames: int, fps: int = 25) -> Tensor:
        """16 kHz mono float32 [n] -> [L, C, frames] float32; frame k hears from sample k * 16000 / fps on.

        Frames map to features in a pattern of a fifth of a second: a window that begins elsewhere than a
        multiple of 3200 samples rounds differently from the whole recording.
        """
        return bucket(resample(self.hidden_states(samples)), frames, fps)
