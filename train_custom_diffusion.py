"""Teach a Stable Diffusion model a new concept from a few photos. Run by `accelerate launch`, or by plain `python`.

Source: Custom Diffusion (Kumari et al., CVPR 2023, arXiv 2212.04488).
"""

import os
import signal
import sys

from custom_diffusion.cli.launcher import end_with_launcher
from custom_diffusion.cli.training_flags import modifier_pairs, parse_args

if __name__ == "__main__":
    end_with_launcher()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins, Ctrl-C simply ends the process
    args, concepts = parse_args()  # before the imports that take seconds: `--help` and a wrong flag answer at once
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would announce that torchvision, unused, is missing
    if sys.platform == "linux":
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on a CPU: huge pages, a tenth faster

import errno
import logging
import math
from collections import OrderedDict
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    send_to_device,
)
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from custom_diffusion.cli.report import exit_with_problems
from custom_diffusion.errors import InputError, first_line
from custom_diffusion.files import recover
from custom_diffusion.model.attention import install_trained_projections
from custom_diffusion.model.concept_model import ConceptModel, cast_frozen
from custom_diffusion.model.cuda_graphs import RecordedUNet, device_problems
from custom_diffusion.model.frozen import replace_frozen_layers
from custom_diffusion.model.loading import load_models, load_tokenizers
from custom_diffusion.model.source import ModelSource, check_model
from custom_diffusion.model.tokens import token_problems
from custom_diffusion.progress import ProgressBar
from custom_diffusion.tools import share
from custom_diffusion.training.augmentation import PROMPT_PREFIXES
from custom_diffusion.training.checkpoints import find_resume, last_good, restore
from custom_diffusion.training.class_images import class_images, generate_class_images, held_out_class_images
from custom_diffusion.training.curve import (
    Curve,
    FixedSet,
    affordable_samples,
    best_step,
    class_images_to_measure,
    in_turn,
    learned_at,
    photos_to_measure,
    smallest,
)
from custom_diffusion.training.curve_report import write_curve
from custom_diffusion.training.latents import LatentEncoder
from custom_diffusion.training.loss_scale import LossScale
from custom_diffusion.training.memory import return_freed_memory
from custom_diffusion.training.objective import custom_diffusion_losses, prediction_target
from custom_diffusion.training.readback import read_back
from custom_diffusion.training.reports import StepReports
from custom_diffusion.training.run_folder import RunFolder, check_token_files
from custom_diffusion.training.samples import Progress, SampleSettings, TrainingBatches, TrainingSamples
from custom_diffusion.training.settings import run_settings
from custom_diffusion.training.stopping import (
    LOST_PROCESS,
    ProcessLost,
    RunStopped,
    StopSignals,
    interrupted_message,
    is_lost_process,
    lost_process_told,
    non_finite_message,
    write_together,
)
from custom_diffusion.training.validation import Validation

logger = get_logger(__name__)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
MODEL_FLAG = "--pretrained_model_name_or_path"
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Plan:
    """What follows from the flags, the model and the number of processes: worked out once, and passed on.

    Attributes:
        pairs: (modifier token, initializer token) of each new word.
        tokens: the modifier tokens alone.
        weight_dtype: of all that is frozen, but for a VAE that would overflow.
        size: side of the images in pixels.
        latent_shape: (C, h, w).
        input_channels: of the UNet, more than C for an inpainting model.
        images_per_sample: a photo, and with prior preservation a class image.
        samples_per_step: of an optimizer step, all processes and accumulated batches together.
        learning_rate: after --scale_lr.
    """

    pairs: list[tuple[str, str]]
    tokens: list[str]
    weight_dtype: torch.dtype
    size: int
    latent_shape: tuple[int, int, int]
    input_channels: int
    images_per_sample: int
    samples_per_step: int
    learning_rate: float


def main(args, concepts):
    """One training run, from flags to saved weights and images. Returns False if an upload was asked for and failed."""
    # Setup: whatever can be known and checked without the weights
    signals = StopSignals()
    accelerator = make_accelerator(args)
    device, output_dir = accelerator.device, Path(args.output_dir)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
    source = make_source(args)
    shape, noise_scheduler = check_model(source)
    plan = make_plan(args, shape, accelerator)
    tokenizers = load_tokenizers(source, shape.family)  # those of the training model get the modifier tokens
    check_flags_fit(args, concepts, plan, shape, tokenizers, device)
    settings = make_settings(args, concepts, plan, shape, accelerator)
    checkpoint = open_output(args, accelerator, plan.tokens, settings)
    repo_id = share.create_repository(args, accelerator) if args.push_to_hub else None
    if args.with_prior_preservation and not args.real_prior:
        draw_class_images(args, concepts, source, accelerator, signals)

    # Model: frozen, but for the trained projections and the modifier tokens' rows
    concept_model, vae = make_model(args, source, plan, device)
    if checkpoint is not None:
        concept_model.load_trained(checkpoint.weights)
    recording = record_cuda_graphs(args, concept_model, plan) if args.cuda_graphs else None

    # Data: the run's sequence of samples, of which this process takes its part
    samples = make_samples(args, concepts, plan, noise_scheduler)
    steps_per_epoch = math.ceil(samples.epoch_length / plan.samples_per_step)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    progress = Progress(0, 0) if checkpoint is None else Progress(checkpoint.step, checkpoint.position)
    batches = make_batches(args, samples, progress, max_train_steps, accelerator)
    encoder = make_encoder(args, vae, batches, accelerator)
    del vae  # with --cache_latents the encoder lets go of it as soon as it has all latents

    # Optimizer and schedule, over the trained parameters alone
    optimizer = make_optimizer(args, concept_model.trained_parameters(), plan.learning_rate)
    lr_scheduler = make_scheduler(args, optimizer, max_train_steps)
    model, optimizer = accelerator.prepare(concept_model, optimizer)
    curve = Curve()
    stateful = {"optimizer": optimizer, "lr_scheduler": lr_scheduler, "curve": curve}
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
    if checkpoint is not None:
        restore(stateful, checkpoint.state)
        logger.info(f"Resuming from checkpoint-{progress.step}")
    del checkpoint
    fixed_set = make_fixed_set(args, concepts, plan, samples, noise_scheduler, encoder, curve, accelerator)

    # Output: checkpoints and weights, images, trackers
    run_folder = make_run_folder(args, concepts, concept_model, plan, settings, stateful)
    validation = make_validation(args, source, shape, noise_scheduler, plan, accelerator)
    if accelerator.is_main_process:
        start_trackers(args, plan, accelerator)
        log_summary(concepts, concept_model, samples, plan.samples_per_step, max_train_steps)

    # Training
    signals.remember()  # from here on, Ctrl-C and SIGTERM finish the step and write a checkpoint
    if not curve.points:
        measure(accelerator, curve, fixed_set, concept_model, progress.step)
    if progress.step == 0:
        validation.during_training(concept_model, step=0)
    reports, loss_scale = StepReports(accelerator), LossScale(accelerator.scaler, output_dir)
    bar = make_bar(max_train_steps, progress.step, accelerator)
    losses = {}  # of the step so far, by name
    for batch in batches:  # they end when `progress` has reached max_train_steps
        # Forward and backward pass; with accumulation, several of them make a step
        with accelerator.accumulate(model):
            batch = send_to_device(batch, device, non_blocking=True)
            batch_losses = training_losses(model, batch, encoder, noise_scheduler, args.prior_loss_weight)
            accelerator.backward(batch_losses["loss"])
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(concept_model.trained_parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        for name, loss in batch_losses.items():
            losses[name] = losses.get(name, 0) + loss.detach() / args.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue

        # A step is done, unless fp16 gradients overflowed: then it does not count, and further samples make up for it
        progress.position += plan.samples_per_step
        step_losses, losses = losses, {}
        if loss_scale.fell(progress.step + 1):  # also stops a run whose gradients never become finite
            continue
        lr_scheduler.step()
        progress.step += 1
        return_freed_memory(device)

        # What all processes now know of it: losses to log, and whether to stop. On a GPU this is one step late, so that
        # nothing waits: `done` then holds the report of the step before, or none at first
        lr = lr_scheduler.get_last_lr()[0]
        done = reports.exchange(progress.step, step_losses, grad_norm, signals.received, lr=lr)
        stop_signal = max((report.stop_signal for report in done), default=0)
        checkpointing = stop_signal or progress.step % args.checkpointing_steps == 0
        at_end = progress.step == max_train_steps
        validating = progress.step % args.validation_steps == 0 or at_end
        if checkpointing or validating:
            done += reports.latest()  # nothing is written or drawn before its losses are known
        for report in done:
            log_step(accelerator, bar, report, curve, output_dir)

        # Between steps: the curve, which checkpoints hold too, checkpoints and images
        if validating:
            measure(accelerator, curve, fixed_set, concept_model, progress.step)
        best = best_step(curve.points, args.prior_loss_weight) if args.keep_best else None
        if checkpointing or best == progress.step:
            # A full disk raises RunStopped in all processes
            write_together(accelerator, output_dir, run_folder.save_checkpoint, progress.step, progress.position, best)
        if stop_signal:
            raise RunStopped(interrupted_message(output_dir, progress.step), status=128 + stop_signal)
        if validating and not at_end:
            validation.during_training(concept_model, progress.step)
        if checkpointing or validating:
            reports.restart_clock()
    bar.close()
    write_together(accelerator, output_dir, run_folder.save_weights, progress.step)
    marks = {"learned": learned_at(curve.points), "best": best_step(curve.points, args.prior_loss_weight)}
    write_together(accelerator, output_dir, write_curve, output_dir, curve.points, marks)
    saved = f"the trained weights are in '{output_dir}'"
    signals.end_at_once(f"train_custom_diffusion.py: stopped by a signal; {saved}")

    # Teardown: what only training needs makes room for the last images. DDP's reducer must go before its process group in
    # any case: as the last to hold a gloo group it could wait for itself forever.
    stateful.clear()  # the run's folder holds it too
    batch_losses = step_losses = encoder = batches = None  # the losses still hold the last prediction
    if recording is not None:
        recording.remove()
    model, optimizer, lr_scheduler = accelerator.free_memory(model, optimizer, lr_scheduler)
    return_freed_memory(device)

    # Read back, draw, share
    shared = True
    if accelerator.is_main_process:
        # As users do it: with tokenizers that have never seen the tokens
        pipeline = read_back(output_dir, concept_model.eval(), validation.pipeline, tokenizers, **run_folder.probe)
        logger.info(f"Saved the weights in '{output_dir}', and read them back")
        images = validation.show(pipeline, name="final", tag="test", step=progress.step)
        if repo_id is not None:
            shared = share.upload_run(args, output_dir, repo_id, run_folder.config(progress.step), images)
    with lost_process_told(saved):
        accelerator.wait_for_everyone()  # the process group must not go while one of them still works
    accelerator.end_training()
    return shared


def make_accelerator(args):
    """Raises InputError for a precision that this machine cannot do."""
    output_dir = Path(args.output_dir)
    # Of the libraries, warnings alone: their HTTP clients would tell of every request.
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    for ours in (__name__, "custom_diffusion"):
        logging.getLogger(ours).setLevel(logging.INFO)
    # Without a GPU, accelerate takes processes that torchrun started for single ones unless it is told.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    try:
        return Accelerator(
            cpu=several_on_cpu,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=None if args.report_to == "none" else args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=output_dir / args.logging_dir),
            kwargs_handlers=[
                AutocastKwargs(enabled=False),  # frozen weights have their precision, trained ones cast themselves
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # others wait while one draws images
            ],
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision: {first_line(error)}") from None


def make_source(args):
    return ModelSource(
        args.pretrained_model_name_or_path,
        args.revision,
        args.variant,
        args.tokenizer_name,
        MODEL_FLAG,
        vae=args.pretrained_vae_model_name_or_path,
        prediction_type=args.prediction_type,
        config_from=args.config_from,
    )


def check_flags_fit(args, concepts, plan, shape, tokenizers, device):
    """Raises InputError for flags that do not fit the model or the device, all in one."""
    prompts = [[prefix + concept.instance_prompt for prefix in PROMPT_PREFIXES] for concept in concepts]
    problems = [problem for tokenizer in tokenizers for problem in token_problems(tokenizer, plan.pairs, prompts)]
    problems = list(dict.fromkeys(problems))  # several tokenizers mostly agree
    if plan.size % shape.vae_factor:
        nearest = max(round(plan.size / shape.vae_factor), 1) * shape.vae_factor
        problems.append(f"--resolution: {plan.size} is not a multiple of {shape.vae_factor}; try {nearest}")
    if args.cache_latents and shape.inpainting:
        problems.append("--cache_latents: an inpainting model sees another hole in an image each time; leave it out")
    if args.cuda_graphs:
        problems += device_problems(device)
    if problems:
        raise InputError(*problems)


def make_plan(args, shape, accelerator):
    pairs = modifier_pairs(args)
    size = args.resolution or shape.family.resolution
    latent_size = size // shape.vae_factor
    images_per_sample = 2 if args.with_prior_preservation else 1
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    return Plan(
        pairs=pairs,
        tokens=[modifier for modifier, _ in pairs],
        weight_dtype=DTYPES[accelerator.mixed_precision],
        size=size,
        latent_shape=(shape.latent_channels, latent_size, latent_size),
        input_channels=shape.input_channels,
        images_per_sample=images_per_sample,
        samples_per_step=samples_per_step,
        learning_rate=args.learning_rate * (samples_per_step * images_per_sample if args.scale_lr else 1),
    )


def make_settings(args, concepts, plan, shape, accelerator):
    """What the course of the run depends on."""
    return run_settings(
        args,
        concepts,
        plan.tokens,
        accelerator.mixed_precision,
        plan.samples_per_step,
        shape.configuration,
        plan.size,
        shape.base_file,
    )


def open_output(args, accelerator, tokens, settings):
    """Mend what a killed run left in the output folder, find the checkpoint to resume from (or None), and make sure that the
    folder takes the tokens' files."""
    output_dir = Path(args.output_dir)
    if accelerator.is_main_process:
        recover(output_dir)
    checkpoint = find_resume(accelerator, output_dir, args.resume_from_checkpoint, settings)
    check_token_files(accelerator, output_dir, tokens)
    return checkpoint


def draw_class_images(args, concepts, source, accelerator, signals):
    """What is missing to --num_class_images, by default in half precision on a GPU."""
    precision = args.prior_generation_precision or ("fp16" if accelerator.device.type == "cuda" else "no")
    generate_class_images(
        accelerator,
        source,
        concepts,
        num_class_images=args.num_class_images,
        batch_size=args.sample_batch_size,
        dtype=DTYPES[precision],
        seed=args.seed,
        signals=signals,
    )


def make_model(args, source, plan, device):
    """The model to train, which knows the modifier tokens, and the VAE's encoder."""
    unet, text, vae = load_models(source, plan.weight_dtype, device)
    install_trained_projections(unet, args.freeze_model)
    replace_frozen_layers(unet)
    text.add_words(plan.pairs)
    cast_frozen(unet, plan.weight_dtype)
    cast_frozen(text, plan.weight_dtype)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
        if plan.pairs:
            for text_encoder in text.encoders:
                text_encoder.gradient_checkpointing_enable()
    return ConceptModel(unet, text).train(), vae


def record_cuda_graphs(args, model, plan):
    """--cuda_graphs: the UNet's training passes, recorded for batches of one shape."""
    num_images = args.train_batch_size * plan.images_per_sample
    with torch.no_grad():
        features, pooled = model.text.encode([""])
    added = model.text.family.added_conditions(pooled, torch.zeros(1, 6))
    return RecordedUNet(
        model.unet,
        (num_images, plan.input_channels, *plan.latent_shape[1:]),
        (num_images, *features.shape[1:]),
        {name: (num_images, *value.shape[1:]) for name, value in (added or {}).items()},
        features_need_grad=bool(plan.tokens),
    )


def make_samples(args, concepts, plan, noise_scheduler):
    """The run's sequence of samples. Decodes the photos."""
    class_image_files = []
    if args.with_prior_preservation:
        for concept in concepts:
            class_image_files += class_images(concept, args.num_class_images, args.real_prior)
    latent_channels, latent_size, _ = plan.latent_shape
    settings = SampleSettings(
        seed=args.seed,
        size=plan.size,
        latent_size=latent_size,
        latent_channels=latent_channels,
        num_train_timesteps=noise_scheduler.config.num_train_timesteps,
        center_crop=args.center_crop,
        hflip=args.hflip,
        augment=not args.noaug,
        pool_size=args.augmentations_per_image if args.cache_latents else None,
        inpainting=plan.input_channels > latent_channels,
    )
    photos = [(path, concept.instance_prompt) for concept in concepts for path in concept.photos()]
    return TrainingSamples(photos, class_image_files, settings)


def make_batches(args, samples, progress, max_train_steps, accelerator):
    return TrainingBatches(
        samples,
        progress,
        max_train_steps,
        num_workers=args.dataloader_num_workers,
        pin_memory=accelerator.device.type == "cuda",
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )


def make_encoder(args, vae, batches, accelerator):
    if not args.cache_latents:
        return LatentEncoder(vae, None)
    # Samples that make up for skipped fp16 steps may show images that were not planned, so the VAE must stay.
    return LatentEncoder(vae, batches.num_views if accelerator.scaler is None else math.inf)


def make_fixed_set(args, concepts, plan, samples, noise_scheduler, encoder, curve, accelerator):
    """What the curve is measured on. A curve that goes on keeps its number of samples."""
    unused = {}  # concepts may share a class
    if args.with_prior_preservation:
        unused = dict(in_turn(held_out_class_images(c, args.num_class_images, args.real_prior) for c in concepts))
    images_per_step = plan.samples_per_step * plan.images_per_sample
    most = curve.num_samples or affordable_samples(images_per_step, args.validation_steps, num_sets=2)
    class_images = class_images_to_measure(unused.items(), plan.size, most)
    class_images = class_images[: smallest(accelerator, len(class_images))]
    if args.with_prior_preservation and not class_images:
        logger.info(
            f"No class images beyond --num_class_images {args.num_class_images} are there to measure what is forgotten"
        )
    if curve.num_samples is None:
        curve.num_samples = affordable_samples(images_per_step, args.validation_steps, 2 if class_images else 1)
    photos = photos_to_measure(samples, plan.size, curve.num_samples)
    inpainting = plan.input_channels > plan.latent_shape[0]
    return FixedSet(
        accelerator, noise_scheduler, encoder, photos, class_images, curve.num_samples, inpainting=inpainting
    )


def make_optimizer(args, parameters, learning_rate):
    """AdamW, fused, or bitsandbytes' 8-bit one."""
    if args.use_8bit_adam:
        import bitsandbytes

        optimizer_class, options = bitsandbytes.optim.AdamW8bit, {}
    else:
        optimizer_class, options = torch.optim.AdamW, {"fused": True}
    return optimizer_class(
        parameters,
        lr=learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        **options,
    )


def make_scheduler(args, optimizer, max_train_steps):
    return get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )


def make_run_folder(args, concepts, model, plan, settings, stateful):
    return RunFolder(
        path=Path(args.output_dir),
        model=model,
        settings=settings,
        validation_prompt=args.validation_prompt,
        formats=("bin",) if args.no_safe_serialization else ("safetensors", "bin"),
        probe={"prompt": concepts[0].instance_prompt, "latent_shape": (1, plan.input_channels, *plan.latent_shape[1:])},
        total_limit=args.checkpoints_total_limit,
        stateful=stateful,
    )


def make_validation(args, source, shape, noise_scheduler, plan, accelerator):
    return Validation(
        accelerator,
        Path(args.output_dir),
        source,
        noise_scheduler,
        prompt=args.validation_prompt,
        num_images=args.num_validation_images,
        size=plan.size,
        seed=args.seed,
        dtype=plan.weight_dtype,
        pipeline_options=shape.pipeline_options,
    )


def make_bar(max_train_steps, step, accelerator):
    return ProgressBar(total=max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)


def start_trackers(args, plan, accelerator):
    """Hand all flags but the Hub's token to the trackers."""
    public = {name: value for name, value in vars(args).items() if name != "hub_token"} | {"resolution": plan.size}
    accelerator.init_trackers("custom-diffusion", config=public)


def log_summary(concepts, model, samples, samples_per_step, max_train_steps):
    """What is about to happen, in the log."""
    trained = sum(p.numel() for p in model.trained_parameters())
    num_prompts = len({concept.instance_prompt for concept in concepts})  # a concept may have several
    logger.info(
        f"Training {trained:,} parameters on {len(samples.photos)} photos with {num_prompts} prompt(s) and "
        f"{len(samples.class_images)} class images, {samples_per_step} samples a step, for {max_train_steps} optimizer steps"
    )


def training_losses(model, batch, encoder, noise_scheduler, prior_loss_weight):
    """Losses by name of a batch of `samples.collate`, on the device."""
    latents = encoder(batch)
    noise, timesteps = batch["noise"], batch["timesteps"]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    if "holes" in batch:  # an inpainting model
        noisy_latents = torch.cat([noisy_latents, encoder.without_holes(batch)], dim=1)
    model_pred = model(noisy_latents, timesteps, batch["prompts"], batch["time_ids"])
    target = prediction_target(noise_scheduler, latents, noise, timesteps)
    return custom_diffusion_losses(model_pred, target, batch["mask"], prior_loss_weight)


def measure(accelerator, curve, fixed_set, model, step):
    """Add a point to the curve, and show it in the trackers; the progress bar shows it with the next step."""
    point = fixed_set.measure(model, step)
    curve.points.append(point)
    accelerator.log(point.by_name(), step=step)


def log_step(accelerator, bar, report, curve, output_dir):
    """Show a step's losses in the progress bar and the trackers. Raises RunStopped if they are not finite."""
    if not report.finite:
        loss = report.losses["loss"]
        what, value = ("gradient", report.grad_norm) if math.isfinite(loss) else ("loss", loss)
        raise RunStopped(non_finite_message(what, value, report.step, output_dir))
    shown = {"loss": f"{report.losses['loss']:.4f}", "lr": f"{report.lr:.3g}"}
    shown |= {name: f"{loss:.4f}" for name, loss in curve.latest().items()}
    bar.set_postfix(OrderedDict(shown), refresh=False)  # tqdm would sort a plain dictionary
    bar.update(1)
    values = {"lr": report.lr, "grad_norm": report.grad_norm, "steps_per_second": 1 / report.seconds}
    accelerator.log(report.losses | values, step=report.step)


def end(message, status=1):
    """End the process with a line below the progress bar."""
    tqdm.write(f"train_custom_diffusion.py: {message}", file=sys.stderr)
    sys.exit(status)


if __name__ == "__main__":
    first = int(os.environ.get("RANK", 0)) == 0
    try:
        sys.exit(0 if main(args, concepts) else 1)
    except InputError as error:
        exit_with_problems("train_custom_diffusion.py", error.problems)
    except ProcessLost as lost:
        end(lost)
    except RunStopped as stop:
        if first:
            end(stop, stop.status)
        sys.exit(stop.status)
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        # Other machines may not see the checkpoints
        end(f"{LOST_PROCESS}. {last_good(Path(args.output_dir))}" if first else LOST_PROCESS)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        end(f"cannot write: {error}. {last_good(Path(args.output_dir))}")
