"""Teach a Stable Diffusion model a new concept from a few photos. Run by `accelerate launch`, or by plain `python`.

Source: Custom Diffusion (Kumari et al., CVPR 2023, arXiv 2212.04488).
"""

import os
import signal
import sys

from custom_diffusion.args import InputError, exit_with_problems, modifier_pairs, parse_args

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins, Ctrl-C simply ends the process
    args, concepts = parse_args()  # before the imports that take seconds: `--help` and a wrong flag answer at once
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it would announce that torchvision, unused, is missing
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on a CPU: huge pages, a tenth faster

import copy
import errno
import logging
import math
import time
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
    set_seed,
)
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm

from custom_diffusion import hub
from custom_diffusion.attention import install_trained_projections
from custom_diffusion.checkpoints import find_resume, last_good, remove_parts, restore
from custom_diffusion.cuda_graphs import device_problems
from custom_diffusion.data import BatchPlan, SampleSettings, TrainingSamples, make_dataloader
from custom_diffusion.frozen import replace_frozen_layers, skip_divisions_by_one
from custom_diffusion.interruption import (
    RunStopped,
    StepReports,
    StopSignals,
    interrupted_message,
    not_finite_message,
    write_together,
)
from custom_diffusion.latents import LatentEncoder
from custom_diffusion.memory import return_freed_memory
from custom_diffusion.models import (
    ConceptModel,
    ModelSource,
    cast_frozen,
    check_model,
    enable_gradient_checkpointing,
    load_models,
    load_tokenizer,
)
from custom_diffusion.objective import custom_diffusion_loss, prediction_target
from custom_diffusion.prior import class_images, generate_class_images
from custom_diffusion.readback import read_back
from custom_diffusion.run_folder import RunFolder
from custom_diffusion.sampling import Sampler, log_samples, save_samples
from custom_diffusion.settings import run_settings, weights_config
from custom_diffusion.tokens import add_modifier_tokens, token_problems

logger = get_logger(__name__)
CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
DTYPES = {"no": torch.float32, "fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main(args, concepts):
    """One training run, from flags to saved weights and pictures."""
    signals = StopSignals()
    accelerator = make_accelerator(args)
    weight_dtype = DTYPES[accelerator.mixed_precision]
    output_dir = Path(args.output_dir)
    pairs = modifier_pairs(args)
    set_seed(args.seed)
    if args.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True

    # Whatever can be checked without the weights
    source = ModelSource(args.pretrained_model_name_or_path, args.revision, args.variant, args.tokenizer_name)
    shape, noise_scheduler = check_model(source)
    tokenizer = load_tokenizer(source)
    check_flags_fit(args, concepts, shape, tokenizer, accelerator.device)
    settings = run_settings(args, concepts, accelerator.mixed_precision)
    checkpoint = find_resume(accelerator, args, settings)
    if accelerator.is_main_process:
        remove_parts(output_dir)
    repo_id = hub.create_repository(args, accelerator) if args.push_to_hub else None

    # Class images
    if args.with_prior_preservation and not args.real_prior:
        generate_class_images(
            accelerator,
            source,
            concepts,
            num_class_images=args.num_class_images,
            batch_size=args.sample_batch_size,
            dtype=prior_dtype(args, accelerator.device),
            seed=args.seed,
            signals=signals,
        )

    # Model: frozen, but for the trained projections and the modifier tokens' rows
    plain_tokenizer = copy.deepcopy(tokenizer)
    concept_model, vae = make_model(args, source, tokenizer, weight_dtype, accelerator.device)
    if checkpoint is not None:
        concept_model.load_trained(checkpoint.weights)
    pictures_per_sample = 2 if args.with_prior_preservation else 1
    latent_shape = (shape.latent_channels, args.resolution // shape.vae_factor, args.resolution // shape.vae_factor)
    if args.cuda_graphs:
        concept_model.record((args.train_batch_size * pictures_per_sample, *latent_shape))

    # Data: the sequence of samples, of which this process takes its part from `position` on
    samples = make_samples(args, concepts, shape, noise_scheduler)
    samples_per_step = args.train_batch_size * args.gradient_accumulation_steps * accelerator.num_processes
    steps_per_epoch = math.ceil(samples.epoch_length / samples_per_step)
    max_train_steps = args.max_train_steps or args.num_train_epochs * steps_per_epoch
    step, position = (checkpoint.step, checkpoint.position) if checkpoint is not None else (0, 0)
    plan = BatchPlan(
        first_position=position,
        num_steps=max(max_train_steps - step, 0),
        batch_size=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
    )
    dataloader, num_views = make_dataloader(
        samples, plan, num_workers=args.dataloader_num_workers, pin_memory=accelerator.device.type == "cuda"
    )
    encoder = LatentEncoder(vae, num_views if args.cache_latents else None)
    del vae  # the encoder lets go of it when it has all latents

    # Optimizer and schedule, over the trained parameters alone
    learning_rate = args.learning_rate
    if args.scale_lr:
        learning_rate *= samples_per_step * pictures_per_sample
    optimizer = make_optimizer(args, concept_model.trained_parameters(), learning_rate)
    lr_scheduler = get_scheduler(
        args.lr_scheduler, optimizer, num_warmup_steps=args.lr_warmup_steps, num_training_steps=max_train_steps
    )
    model, optimizer = accelerator.prepare(concept_model, optimizer)
    stateful = {"optimizer": optimizer, "lr_scheduler": lr_scheduler}
    if accelerator.scaler is not None:
        stateful["scaler"] = accelerator.scaler
    if checkpoint is not None:
        restore(stateful, checkpoint.state)
        logger.info(f"Resuming from checkpoint-{step}")
    del checkpoint

    # What is done between steps, and at the end
    probe = {"prompt": concepts[0].instance_prompt, "latent_shape": (1, *latent_shape)}
    run_folder = RunFolder(
        path=output_dir,
        model=concept_model,
        tokens=[token for token, _ in pairs],
        settings=settings,
        formats=("bin",) if args.no_safe_serialization else ("safetensors", "bin"),
        probe=probe,
    )

    def save_checkpoint():
        run_folder.save_checkpoint(step, position, stateful, args.checkpoints_total_limit)

    sampler = Sampler(
        source,
        noise_scheduler,
        prompt=args.validation_prompt,
        num_images=args.num_validation_images,
        size=args.resolution,
        seed=args.seed,
        dtype=weight_dtype,
        device=accelerator.device,
    )

    def show(pipeline, name, tag):
        images = sampler.draw(pipeline)
        log_samples(accelerator, images, tag=tag, prompt=args.validation_prompt, step=step)
        return save_samples(images, output_dir / "samples", name) if images else []

    def validate():
        if accelerator.is_main_process and sampler.num_images:
            concept_model.eval()
            pipeline = sampler.pipeline(concept_model.unet, concept_model.text_encoder, tokenizer)
            show(pipeline, f"step-{step:06d}", "validation")
            concept_model.train()

    # Training
    if accelerator.is_main_process:
        public = {name: value for name, value in vars(args).items() if name != "hub_token"}
        accelerator.init_trackers("custom-diffusion", config=public)
        print_summary(args, concepts, concept_model, samples, samples_per_step, max_train_steps)
    if step == 0:
        validate()
    reports = StepReports(accelerator)
    bar = tqdm(total=max_train_steps, initial=step, desc="Steps", disable=not accelerator.is_local_main_process)
    losses = torch.zeros(3, device=accelerator.device)
    started = time.perf_counter()
    for batch in dataloader:
        with accelerator.accumulate(model):
            batch = send_to_device(batch, accelerator.device, non_blocking=True)
            loss, *parts = training_loss(model, batch, encoder, noise_scheduler, args.prior_loss_weight)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(concept_model.trained_parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=not args.cuda_graphs)
        losses += torch.stack([loss, *parts]).detach() / args.gradient_accumulation_steps
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        step, position = step + 1, position + samples_per_step
        return_freed_memory(accelerator.device)

        started, seconds = time.perf_counter(), time.perf_counter() - started
        lr = lr_scheduler.get_last_lr()[0]
        done = reports.exchange(step, losses, grad_norm, signals.received, lr=lr, seconds=seconds)
        losses = torch.zeros_like(losses)
        stop_signal = max((report.stop_signal for report in done), default=0)
        if stop_signal or step == max_train_steps or step % args.checkpointing_steps == 0:
            done += reports.latest()  # nothing is written before its losses are known
        for report in done:
            if not report.finite:
                raise RunStopped(not_finite_message("loss", report.loss, report.step, output_dir))
            log_step(accelerator, bar, report)
        if stop_signal:
            write_together(accelerator, save_checkpoint, output_dir)
            raise RunStopped(interrupted_message(output_dir, step), status=128 + stop_signal)
        if step % args.checkpointing_steps == 0:
            write_together(accelerator, save_checkpoint, output_dir)
        if step % args.validation_steps == 0 and step < max_train_steps:
            validate()
    bar.close()

    # Write, read back, draw, share
    write_together(accelerator, lambda: run_folder.save_weights(step), output_dir)
    # What only training needs makes room for the pictures. DDP's reducer must go before its process group in any case: as
    # the last to hold a gloo group it could wait for itself forever.
    del encoder
    stateful.clear()
    loss = parts = concept_model.recorded = None  # the last loss still holds the recording
    model, optimizer, lr_scheduler = accelerator.free_memory(model, optimizer, lr_scheduler)
    return_freed_memory(accelerator.device)
    if accelerator.is_main_process:
        pipeline = read_back(output_dir, concept_model.eval(), sampler.pipeline, plain_tokenizer, **probe)
        logger.info(f"Saved the weights in '{output_dir}', and read them back")
        pictures = show(pipeline, "final", "test")
        if repo_id is not None:
            hub.share(args, output_dir, repo_id, weights_config(settings, step), pictures)
    accelerator.end_training()


def make_accelerator(args):
    """Raises InputError for a precision that this machine cannot do."""
    output_dir = Path(args.output_dir)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for noisy in ("httpx", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    # Without a GPU, accelerate takes processes that torchrun started for single ones unless it is told.
    several_on_cpu = int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available()
    try:
        return Accelerator(
            cpu=several_on_cpu,
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            mixed_precision=args.mixed_precision,
            log_with=args.report_to,
            project_config=ProjectConfiguration(project_dir=args.output_dir, logging_dir=output_dir / args.logging_dir),
            kwargs_handlers=[
                AutocastKwargs(enabled=False),  # frozen weights have their precision, trained ones cast themselves
                DistributedDataParallelKwargs(broadcast_buffers=False),
                InitProcessGroupKwargs(timeout=timedelta(hours=6)),  # others wait while one draws pictures
            ],
        )
    except ValueError as error:
        raise InputError(f"--mixed_precision: {str(error).splitlines()[0]}") from None


def check_flags_fit(args, concepts, shape, tokenizer, device):
    """Raises InputError for flags that do not fit the model or the device, all in one."""
    problems = token_problems(tokenizer, modifier_pairs(args), [concept.instance_prompt for concept in concepts])
    if args.resolution % shape.vae_factor:
        nearest = max(round(args.resolution / shape.vae_factor), 1) * shape.vae_factor
        problems.append(f"--resolution: {args.resolution} is not a multiple of {shape.vae_factor}; try {nearest}")
    if args.cuda_graphs:
        problems += device_problems(device)
    if problems:
        raise InputError(*problems)


def prior_dtype(args, device):
    """--prior_generation_precision, by default half precision on a GPU."""
    return DTYPES[args.prior_generation_precision or ("fp16" if device.type == "cuda" else "no")]


def make_model(args, source, tokenizer, dtype, device):
    """The model to train, with the modifier tokens added to `tokenizer`, and the VAE's encoder."""
    unet, text_encoder, vae = load_models(source, dtype, device)
    pairs = modifier_pairs(args)
    install_trained_projections(unet, args.freeze_model)
    replace_frozen_layers(unet)
    skip_divisions_by_one(unet)
    skip_divisions_by_one(vae)
    add_modifier_tokens(tokenizer, text_encoder, pairs)
    cast_frozen(unet, dtype)
    cast_frozen(text_encoder, dtype)
    if args.enable_xformers_memory_efficient_attention:
        unet.enable_xformers_memory_efficient_attention()
    if args.gradient_checkpointing:
        enable_gradient_checkpointing(unet)
        if pairs:
            text_encoder.gradient_checkpointing_enable()
    return ConceptModel(unet, text_encoder, tokenizer, [token for token, _ in pairs]).train(), vae


def make_samples(args, concepts, shape, noise_scheduler):
    """The run's sequence of samples. Decodes the photos."""
    class_pictures = []
    if args.with_prior_preservation:
        for concept in concepts:
            class_pictures += class_images(concept, args.num_class_images, args.real_prior)
    settings = SampleSettings(
        seed=args.seed,
        size=args.resolution,
        latent_size=args.resolution // shape.vae_factor,
        latent_channels=shape.latent_channels,
        num_train_timesteps=noise_scheduler.config.num_train_timesteps,
        center_crop=args.center_crop,
        hflip=args.hflip,
        augment=not args.noaug,
        pool_size=args.augmentations_per_image if args.cache_latents else None,
    )
    photos = [(path, concept.instance_prompt) for concept in concepts for path in concept.photos()]
    return TrainingSamples(photos, class_pictures, settings)


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


def training_loss(model, batch, encoder, noise_scheduler, prior_loss_weight):
    """Total, instance and prior loss of a batch of `data.collate`, on the device."""
    latents = encoder(batch)
    noise, timesteps = batch["noise"], batch["timesteps"]
    noisy_latents = noise_scheduler.add_noise(latents, noise, timesteps)
    model_pred = model(noisy_latents, timesteps, batch["prompts"])
    target = prediction_target(noise_scheduler, latents, noise, timesteps)
    return custom_diffusion_loss(model_pred, target, batch["mask"], prior_loss_weight)


def print_summary(args, concepts, model, samples, samples_per_step, max_train_steps):
    """What is about to happen, in the log."""
    trained = sum(p.numel() for p in model.trained_parameters())
    logger.info(
        f"Training {trained:,} parameters on {len(samples.photos)} photos of {len(concepts)} concept(s) and "
        f"{len(samples.class_images)} class images, {samples_per_step} a step, for {max_train_steps} optimizer steps"
    )


def log_step(accelerator, bar, report):
    """Show a step's losses in the progress bar and the trackers."""
    bar.update(1)
    bar.set_postfix(loss=f"{report.loss:.4f}", lr=f"{report.lr:.3g}")
    values = {
        "loss": report.loss,
        "instance_loss": report.instance_loss,
        "prior_loss": report.prior_loss,
        "lr": report.lr,
        "grad_norm": report.grad_norm,
        "steps_per_second": 1 / report.seconds,
    }
    accelerator.log(values, step=report.step)


if __name__ == "__main__":
    try:
        main(args, concepts)
    except InputError as error:
        exit_with_problems("train_custom_diffusion.py", error.problems)
    except RunStopped as stop:
        if int(os.environ.get("RANK", 0)) == 0:
            tqdm.write(f"train_custom_diffusion.py: {stop}", file=sys.stderr)  # below the progress bar
        sys.exit(stop.status)
    except OSError as error:
        if error.errno not in CANNOT_WRITE:
            raise
        tqdm.write(
            f"train_custom_diffusion.py: cannot write: {error}. {last_good(Path(args.output_dir))}", file=sys.stderr
        )
        sys.exit(1)
