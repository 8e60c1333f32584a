"""Every setting with its default. `ray_jobs/settings.py` reads them once; below it they travel as frozen
objects.

The settings are flat for the user (`size=704*384 sample_steps=3`) and grouped for the code: each stage takes
the group that it needs, and `Settings` inherits them all. Fields without a default that makes sense
everywhere are `MISSING` and come from `conf/model/<model>.yaml`; a run that leaves one open is refused.
"""

from dataclasses import dataclass, field

from omegaconf import MISSING

from conf.spec import TextEncoderSpec, VaeSpec


@dataclass(frozen=True)
class PortraitSettings:
    """How a portrait becomes the reference picture."""

    size: str = MISSING
    """Area of the video as upstream writes it, `704*384` (also `704x384`). It is an area: the picture keeps
    its own aspect and both sides become multiples of 64, so `720*400` renders 704x384 for a 16:9 portrait and
    512x512 for a square one; `lectern plan` prints the true size. More pixels cost more than their
    share of time and memory."""

    aspect: str = "keep"
    """`keep` renders the portrait's own aspect; `16:9`, `9:16` and `1:1` cut the portrait to that shape
    first. Set it when portraits of mixed shapes must give a course of one shape; how much was cut away stands
    in the plan and in the results."""

    crop: str = "face"
    """What survives where `aspect` or the rounding of sides cuts: `face` keeps the detected face well placed
    and refuses portraits without one, `none` cuts around the middle, `x,y,w,h` (pixels of the upright
    picture) shows nothing outside that rectangle. `none` serves drawn characters in whom no face is
    found."""


@dataclass(frozen=True)
class SoundSettings:
    """How a recording becomes frames and segments."""

    num_clip: int | None = None
    """Render at most this many clips (of `infer_frames` frames), and cut the sound to match; the results say
    so. Empty renders the whole recording. Upstream's name; useful for previews."""

    segment_seconds: float = 60.0
    """Lessons are cut into pieces of about this length that are rendered, kept and retried as one. Shorter
    pieces lose less when a machine vanishes and cost more replay (3 % at 60 s, 10 % at 20 s); 0 never
    cuts, which is upstream's way."""

    cut_search_seconds: float = 5.0
    """A cut is moved to the quietest clip boundary within this distance, and a rest shorter than twice this
    plus 2 s joins the last segment. Must be at most a quarter of `segment_seconds`."""

    audio_context_seconds: float = 10.0
    """Speech features of a segment are computed from its sound plus this much on each side. Less makes
    features near a cut worse; more makes a small change in the recording re-render more."""

    lead_frames: int = 0
    """By how many frames the picture leads the sound: 0 shows the mouth with its sound, 3 is upstream's
    behaviour (it drops the decoder's first three frames and not their sound)."""


@dataclass(frozen=True)
class GenerationSettings:
    """What the transformer does. All of these are part of a segment's identity."""

    infer_frames: int = 48
    """Frames of a clip: the length of the rolling caches and the unit in which cuts are made. A multiple of
    12. The published weights were trained with 48; less saves cache memory and forgets sooner."""

    sample_steps: int = 4
    """Denoising steps. The published LoRA is distilled for 4; 3 is a quarter faster and a little softer."""

    sample_solver: str = "euler"
    """`euler` (what the LoRA was distilled with), `unipc` or `dpm++`."""

    sample_shift: float = 3.0
    """Shift of the noise levels towards noise. Upstream ignores its own flag and always uses 3."""

    sample_guide_scale: float = 0.0
    """Classifier-free guidance: 0 is off, else above 1. It doubles calls and caches, steers away from
    `negative_prompt` and from silence, and a LoRA that was distilled does not want it."""

    negative_prompt: str = ""
    """What guidance steers away from. Only with `sample_guide_scale` above 0; an error otherwise."""

    base_seed: int = 420
    """Seed of all noise of a lesson. One constant by default, so that equal lessons give equal segments and
    are rendered once. Another number gives another take."""

    reference: str = "first_latent"
    """What the picture is tied to after the first clip: `first_latent` (the first generated latent,
    upstream's multi-GPU rule), `keep` (the portrait for ever, upstream's single-GPU default),
    `first_latent_and_motion` (both the first latent and re-encoded motion frames, upstream's single-GPU
    online decoding)."""

    continuity: str = "carry"
    """`carry` goes on seamlessly from the segment before; `independent` starts each segment from the
    portrait, so that one urgent lesson spreads over many GPUs at the price of a visible seam."""


@dataclass(frozen=True)
class VideoSettings:
    """How frames become H.264. Part of a segment's identity, since its bytes depend on them."""

    crf: int = 18
    """Quality of the video, 0 to 51: lower is better and larger. 18 is visually lossless for most people."""

    encoder_preset: str = "veryfast"
    """x264's speed. Slower presets make smaller files of the same quality."""

    encoder_threads: int = 1
    """Threads of one encoder. The number changes the bytes, so it is fixed and not taken from the machine."""


@dataclass(frozen=True)
class DeliverySettings:
    """How the finished file is made from its segments. Not part of a segment's identity."""

    output_name: str = "{lesson_id}.mp4"
    """Name of a finished file inside `--out`. `{lesson_id}` and any `{x_...}` column may stand in it; two
    lessons with the same name are refused."""

    audio_bitrate: int = 192_000
    """Bits per second of the AAC narration. Low rates and mono recordings get less, as far as AAC allows."""

    loudness: str = "keep"
    """`keep` leaves the recording as loud as it is; a number such as `-16` applies one static gain to reach
    that many LUFS. It never enters the model."""


@dataclass(frozen=True)
class ModelSettings:
    """Which weights, where and in which arithmetic. `conf/model/<model>.yaml` fills these."""

    model: str = "tiny"
    """Name of a file in `conf/model`: `tiny` (random weights, pictures are noise) or `liveavatar-14b`."""

    ckpt_dir: str = MISSING
    """Folder with the checkpoint in Wan2.2-S2V-14B's layout, or the Hub id it is published under."""

    lora_path_dmd: str | None = None
    """Live Avatar's LoRA: a file, a folder, or a Hub id. Merged into the weights once, at load. Empty for
    a checkpoint that needs none, or has it merged in already."""

    lora_alpha: float = 64.0
    """With `lora_rank` gives the LoRA's scale; both come from upstream's training, not from the file."""

    lora_rank: int = 128
    """See `lora_alpha`. Checked against the file's tensors."""

    device: str = MISSING
    """`cuda` or `cpu`. Never guessed: a CPU run of the 14B would take weeks."""

    dtype: str = MISSING
    """`bfloat16` or `float32`: the transformer's arithmetic."""

    vae_dtype: str = MISSING
    """`bfloat16` or `float32`: the video autoencoder's arithmetic."""

    attention_backend: str = "sdpa"
    """`sdpa`, `flash`, `cudnn` or `sage`. One that is not installed is an error, not a reason for another."""

    vae: VaeSpec = field(default_factory=VaeSpec)
    """File and dimensions of the video autoencoder; the published file does not carry its own."""

    text_encoder: TextEncoderSpec = field(default_factory=TextEncoderSpec)
    """File, tokenizer and dimensions of the text encoder; the published file does not carry its own."""

    audio_encoder: str = "wav2vec2-large-xlsr-53-english"
    """Folder of the speech encoder inside `ckpt_dir`, in transformers' format."""


@dataclass(frozen=True)
class RunSettings:
    """How the work is spread. None of these changes a picture."""

    num_groups: int = 1
    """Groups that hold one copy of the transformer each, and so lessons that are denoised at once."""

    num_decoders: int = 1
    """Actors that turn latents into H.264. One serves about nine groups of the same kind of GPU."""

    num_conditioners: int = 1
    """Actors that encode prompts, portraits and speech."""

    prepare_workers: int = 2
    """CPU tasks that read recordings and join finished files, at the same time."""

    decode_slots: int = 4
    """Segments that one decoder holds at once; each costs the decoder's state (1.2 GiB for the 14B)."""

    window_blocks: int = 4
    """Blocks of a segment that may be submitted ahead of the decoder. More blocks hide more
    latency and hold more latents."""

    threads: int = 1
    """CPU threads of torch in every actor and in `--local`. Two threads on two busy cores are slower than
    one."""

    denoise_cpus: float = 1.0
    """CPUs that Ray reserves for one rank of a group."""

    decode_cpus: float = 0.5
    """CPUs that Ray reserves for one decoder."""

    condition_cpus: float = 0.25
    """CPUs that Ray reserves for one conditioner."""

    prepare_cpus: float = 0.25
    """CPUs that Ray reserves for one prepare or mux task."""

    denoise_gpus: float = 1.0
    """GPUs, or a fraction of one, that Ray reserves for one rank when `device` is `cuda`. A fraction lets
    decoder and conditioner share a card that holds them all: Ray counts, but does not divide the card's
    memory."""

    decode_gpus: float = 0.5
    """GPUs, or a fraction of one, for each decoder when `device` is `cuda`; must then be above 0."""

    condition_gpus: float = 0.5
    """GPUs, or a fraction of one, for each conditioner when `device` is `cuda`; must then be above 0. Decoder
    and conditioner share the second card of a machine by default."""

    cpu_resource: str = ""
    """Name of a custom resource that the cluster's CPU nodes declare; CPU work then asks for a little of it,
    so that it never makes the autoscaler start a GPU node. Empty where any node will do."""

    max_image_pixels: int = 100_000_000
    """Portraits with more pixels are refused from their header, before they are unpacked. Raise it only for
    pictures that you trust: a 10 kB file can unpack to gigabytes."""

    max_tries: int = 3
    """How often a segment may fail by an error of its own before its lesson fails. Lost machines do not
    count."""

    placement_timeout: float = 600.0
    """Seconds that a group may wait for its resources before the run says which one is missing and ends."""

    progress_seconds: float = 60.0
    """Seconds between two lines of progress where there is no terminal."""


@dataclass(frozen=True)
class Settings(
    RunSettings,
    ModelSettings,
    DeliverySettings,
    VideoSettings,
    GenerationSettings,
    SoundSettings,
    PortraitSettings,
):
    """All settings, flat. Each stage takes the group that it needs."""
