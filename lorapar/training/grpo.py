"""Stage 2: GRPO on the other system's elements and rows, from stage 1's result (paper section 3.4), on TRL's trainer.

With `beta` ≠ 0 the reference model is the adapter as it came, stage 1's result, which TRL copies to an adapter "ref".
What one card has to bear: the base is there once and never written. vLLM is handed base + delta a layer at a time
(merging.py), where TRL merges the adapter into the base and out again at every sync.
"""

import functools
import importlib.util
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]
from trl.models.activation_offloading import get_act_offloading_ctx_manager

from ..adapter.merging import merged_parameters
from ..adapter.proof import NothingMoved
from ..data.labels import once_a_prompt, rows_of
from ..data.tokens import check_known, prompt_ids, row_kwargs
from ..data.turns import Turns
from ..distributed import processes
from ..errors import InputError, NothingLearned, not_installed, require
from ..model.generate import set_stop_tokens, stop_tokens
from ..model.positions import positions_of
from ..model.quantised import given_form
from ..partitioning.partition import Partition
from ..recipe.checks import check_trainer_keys, check_value
from ..recipe.sections import GRPOStageConfig
from ..recipe.values import check_keys
from ..rewards import CheckedReward, Reward, check_answers, check_call, checked, resolve_rewards
from ..scoring.batches import read_examples
from .answer_head import score_answers_alone
from .rehearsal import longest, rehearsing
from .tally import EARLY, RewardTally
from .trainer import PAPER, PartitionedTrainer, Trained, made_by, of_each_process, train
from .watching import LossWatch, check_watching

log = logging.getLogger("lorapar")
# In a checkpoint, of each process: the completions that it has generated and not yet trained on.
ROLLOUTS = "rollouts{}.pt"
# Ours, or the completion that GRPO makes itself; the rest reaches the rewards by name.
NOT_FOR_REWARDS = ("completion", "split", "votes", "agreement", "teachers", "prompts", "completions")


class PartitionedGRPOTrainer(PartitionedTrainer, GRPOTrainer):
    """TRL's GRPOTrainer that trains a partition's "grpo" elements; takes what GRPOTrainer takes.

    rollout_batch_size: completions generated at once; None: all of a generation batch.
    logprob_tokens: tokens whose log-probabilities are taken at once; None: see answer_head.py.
    activation_offloading: what the backward needs waits in the host's memory, as TRL's own switch does it in SFT.
    """

    _tag_names = ["trl", "grpo", "lora-par"]  # noqa: RUF012 (TRL reads it off the class)
    _name = "LoRA-PAR GRPO"
    _paper = PAPER

    stage = "grpo"
    max_completion_length: int
    num_generations: int

    def __init__(
        self,
        model: Any,
        *args: Any,
        rollout_batch_size: int | None = None,
        logprob_tokens: int | None = None,
        activation_offloading: bool = False,
        **kwargs: Any,
    ):
        super().__init__(model, *args, **kwargs)
        self._take_stop_tokens()
        made = cast(PeftModel, self.model)
        if activation_offloading:
            self.maybe_activation_offload_context = get_act_offloading_ctx_manager(made)
        self._rows: list[dict[str, Any]] = []  # of the batch that is generated
        self.rollout_batch_size = rollout_batch_size
        self.rollout_seconds = 0.0
        # A reward given as a model is TRL's to call.
        self.reward_funcs = [f if isinstance(f, nn.Module) else checked(f) for f in self.reward_funcs]
        self.tally = RewardTally()
        needs_trl = self._entropy_bonus_enabled or bool(cast(GRPOConfig, self.args).cast_lm_head_to_fp32)
        score_answers_alone(cast(Any, made.get_base_model()), logprob_tokens, self.temperature, needs_trl)
        if self.use_vllm:
            cast(Any, self.vllm_generation)._iter_named_params = functools.partial(merged_parameters, made)

    def _take_stop_tokens(self) -> None:
        """Rollouts end, and are counted as ended, at the tokens that evaluation ends at."""
        set_stop_tokens(self.model, self._tokenizer)
        self.eos_token_ids = stop_tokens(self.model, self._tokenizer)
        if self.use_vllm:
            given = self.vllm_generation.generation_kwargs
            self.vllm_generation.generation_kwargs = {"stop_token_ids": self.eos_token_ids, **given}
        else:
            self.generation_config.eos_token_id = self.generation_kwargs["eos_token_id"] = self.eos_token_ids

    # Going on from a checkpoint. TRL would generate anew in the middle of a generation batch (steps_per_generation,
    # num_iterations), and take the prompts of a later epoch in the order of the first.

    def checkpoint_files(self, count: int) -> list[str]:
        return [*super().checkpoint_files(count), *of_each_process(ROLLOUTS, count)]

    def why_not_by_others(self, checkpoint: Path, count: int) -> str | None:
        files = [checkpoint / name for name in of_each_process(ROLLOUTS, count)]
        waiting = any(torch.load(file, map_location="cpu", weights_only=True)["batches"] is not None for file in files)
        return f"{count} processes have completions there that they have not trained on yet" if waiting else None

    def save_of_each(self, output_dir: str) -> None:
        done = self._step % (cast(Any, self.args).steps_per_generation * self.num_iterations) == 0
        state = {"step": self._step, "batches": None if done else self._buffered_inputs}
        torch.save(state, self._rollouts(output_dir))

    def _rollouts(self, checkpoint: str) -> Path:
        return Path(checkpoint) / of_each_process(ROLLOUTS, self.args.world_size)[self.args.process_index]

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            if made_by(Path(checkpoint))["processes"] not in (None, self.args.world_size):
                # Taken only where every completion there has been trained on.
                self._step = self.state.global_step * self.args.gradient_accumulation_steps
                return
            state = torch.load(self._rollouts(checkpoint), map_location=self.accelerator.device, weights_only=True)
            self._step, self._buffered_inputs = state["step"], state["batches"]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if kwargs["resume_from_checkpoint"] is not None and kwargs["epoch"] == kwargs["epochs_trained"]:
            for _ in range(kwargs["epoch"]):
                next(iter(self._sampler), None)  # draws an epoch's order
        super()._run_epoch(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        self._rows = inputs
        return super()._generate_and_score_completions(inputs)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        # TRL's own reads neither `tools` nor `chat_template_kwargs` of a row, and adds an EOS where a tokenizer does.
        if self._is_vlm or self.tools or self.environment_factories or len(prompts) != len(self._rows):
            return super()._tokenize_prompts(prompts)
        return [self._prompt_ids({**row, "prompt": prompt}) for row, prompt in zip(self._rows, prompts)], None, {}

    def _prompt_ids(self, row: dict[str, Any]) -> list[int]:
        kwargs: Any = self.chat_template_kwargs
        ids = prompt_ids({**row, "chat_template_kwargs": {**kwargs, **row_kwargs(row)}}, self._tokenizer)
        check_known(ids, self.accelerator.unwrap_model(self.model), self._tokenizer, str(row.get("id", "(no id)")))
        return ids

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[list[int]]
    ) -> torch.Tensor:
        texts = [self._without_end(made, ids) for made, ids in zip(completions, completion_ids_list)]
        rewards = super()._calculate_rewards(inputs, prompts, texts, completion_ids_list)
        if cast(nn.Module, self.model).training:
            apart = self.multi_objective_aggregation == "normalize_then_sum"
            self.tally.add(rewards, self.reward_weights, self.num_generations, apart)
            self.tally.ended += sum(ids[-1:] != [] and ids[-1] in self.eos_token_ids for ids in completion_ids_list)
            if self.tally.batches == EARLY and self.tally.all_equal and self.is_world_process_zero():
                log.warning("grpo: after %d batches, %s", self.tally.batches, self.tally.said(self.remedies()))
        return rewards

    def remedies(self) -> str:
        """What may make the rewards of a group differ."""
        return (
            f"a higher grpo.temperature (now {self.temperature:g}) or more grpo.num_generations (now "
            f"{self.num_generations}), so that completions differ; a grpo.max_completion_length (now "
            f"{self.max_completion_length}) that lets them end; easier rows, or harder ones; rewards with more steps "
            "than right and wrong (closeness, tags, task_score)"
        )

    def _without_end(self, made: Any, ids: list[int]) -> Any:
        """A completion, text or messages, without what ended it: decoding leaves out special tokens alone."""
        if not ids or ids[-1] not in self.eos_token_ids:
            return made
        end = str(self._tokenizer.decode([ids[-1]]))
        if isinstance(made, str):
            return made.removesuffix(end)
        *others, last = made
        content = last.get("content")
        return [*others, {**last, "content": content.removesuffix(end)}] if isinstance(content, str) else made

    def backward_of_batch(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        # Rollouts and their log-probabilities keep nothing for a backward, so nothing of theirs moves.
        with self.maybe_activation_offload_context:
            return super().backward_of_batch(*args, **kwargs)

    def _generate_single_turn(
        self, prompt_ids: list[list[int]], images: Any, fields: Any, num_generations: int, *rest: Any, **kw: Any
    ) -> tuple[Any, Any]:
        if not self.use_vllm:
            # Drawing a token of probabilities that are not finite ends a GPU's process without a word of the cause.
            self.check_finite(prompt_ids[0][:64])
        began = time.perf_counter()
        # vLLM schedules by itself what it holds at once.
        at_once = len(prompt_ids) if self.use_vllm else self.rollout_batch_size or len(prompt_ids)
        completions, logprobs = [], None
        for start in range(0, len(prompt_ids), at_once):
            some = prompt_ids[start : start + at_once]
            made, logprobs = super()._generate_single_turn(some, images, fields, num_generations, *rest, **kw)
            completions += made
        self.rollout_seconds += time.perf_counter() - began
        return completions, logprobs

    def some_tokens(self) -> list[int]:
        return self._prompt_ids(cast(Dataset, self.train_dataset)[0])[:64]

    def rehearse(self, model: Any) -> None:
        """The longest prompts with completions of `max_completion_length`: a rollout, and one batch's gradients."""
        rows = cast(Dataset, self.train_dataset)
        prompts = [self._prompt_ids(rows[i]) for i in range(len(rows))]
        batch, length = self.args.per_device_train_batch_size, self.max_completion_length
        together = batch * cast(Any, self.args).steps_per_generation
        at_once = min(self.rollout_batch_size or together, together)
        chosen = [prompts[place] for place in longest([len(ids) for ids in prompts], max(batch, at_once))]
        # A group is one prompt many times, and there may be fewer prompts than a batch holds.
        chosen = (chosen * max(batch, at_once))[: max(batch, at_once)]
        what = f"prompts of up to {len(chosen[0])} tokens with completions of {length}"
        seconds = self.rollout_seconds
        with rehearsing(self, model, what):
            if not self.use_vllm:
                self._roll_out_to_the_end(chosen[:at_once])
            inputs = self._worst_batch(chosen[:batch], length)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            self.accelerator.backward(loss)
        self.rollout_seconds = seconds

    def _roll_out_to_the_end(self, prompts: list[list[int]]) -> None:
        """Completions of the full length: no token ends one."""
        settings = self.generation_config
        given = settings.min_new_tokens
        settings.min_new_tokens = self.max_completion_length
        try:
            self._generate_single_turn(prompts, None, {}, self.num_generations)
        finally:
            settings.min_new_tokens = given

    def _worst_batch(self, prompts: list[list[int]], length: int) -> dict[str, torch.Tensor]:
        """What `_generate_and_score_completions` gives, of these prompts and any completions of `length` tokens."""
        device, count = self.accelerator.device, len(prompts)
        padded = self._tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(device)
        ones = torch.ones(count, length, device=device)
        inputs = {
            "prompt_ids": padded["input_ids"],
            "prompt_mask": padded["attention_mask"],
            "completion_ids": padded["input_ids"][:, -1:].repeat(1, length),
            "completion_mask": ones.long(),
            "advantages": ones[:, 0],
            "num_items_in_batch": ones.sum(),
        }
        if self.beta:
            inputs["ref_per_token_logps"] = -ones
        if self.use_vllm and self.vllm_importance_sampling_correction:
            inputs["importance_sampling_ratio"] = ones
        return inputs


def check_engine(config: GRPOConfig, base: str | None) -> None:
    """Refuse a vLLM that is not here, and one that cannot take the weights of a base in the form `base`."""
    if not config.use_vllm:
        return
    if importlib.util.find_spec("vllm") is None:
        raise InputError(f"grpo.use_vllm: {not_installed('vLLM', 'vllm')}")
    if base in ("nf4", "fp4", "int8") and config.vllm_mode == "colocate":
        raise InputError(
            f"grpo.vllm_mode: got colocate with a base in {base}, which vLLM would quantise anew at each sync; serve "
            "the model in bf16 (vllm_mode: server), or leave use_vllm out"
        )


def _watch(
    model: PeftModel, tokenizer: Any, rows: Dataset, config: GRPOConfig, systems: Sequence[int], rise: float,
    turns: Turns,
) -> LossWatch:  # fmt: skip
    check_watching(config)
    require(len(rows) > 0, "watched", "no rows", "at least one row, or None")
    others = [system for system in (1, 2) if system not in systems]
    require(bool(others), "systems", list(systems), "one system beside watched rows, which are of the other")
    examples = read_examples(cast(Any, rows), tokenizer, None, turns)
    for example in examples:
        check_known(example.ids, model, tokenizer, example.name)
    return LossWatch(Path(cast(str, config.output_dir)), examples, others[0], rise)


def check_generation(config: GRPOConfig, vocabulary: int) -> None:
    """InputError for settings of the rollouts that transformers cannot generate with: one token of a model of no size
    is generated with them. vLLM has names of its own."""
    given: dict[str, Any] = cast(Any, config.generation_kwargs) or {}
    if config.use_vllm:
        return
    check_keys(
        given, [name for name in vars(GenerationConfig()) if not name.startswith("_")], "grpo.generation_kwargs."
    )
    longest = given.get("max_new_tokens")
    one = {"max_new_tokens": 1} if isinstance(longest, int) and longest > 1 else {}
    settings = {"do_sample": True, "pad_token_id": 0, "max_new_tokens": 1, "temperature": config.temperature,
                "top_p": config.top_p, "top_k": config.top_k, "min_p": config.min_p,
                "repetition_penalty": config.repetition_penalty,
                "cache_implementation": config.cache_implementation, **given, **one}  # fmt: skip
    at = f"grpo.generation_kwargs: got {given!r}" if given else "grpo"
    with torch.random.fork_rng([]):
        size: Any = {"hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 1}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, max_position_embeddings=64, **size))
        try:
            made = model.generate(torch.zeros(1, 2, dtype=torch.long),
                                  generation_config=GenerationConfig(**settings, disable_compile=True))  # fmt: skip
        except Exception as error:
            raise InputError(f"{at}: {error}") from None
    count = len(made) if isinstance(made, torch.Tensor) else None
    require(count == 1, "grpo.generation_kwargs", given, "settings that give a prompt one completion and nothing else; "
            "grpo.num_generations says how many it gets")  # fmt: skip


def check_prompts(prompts: int, config: GRPOConfig) -> None:
    """InputError where there are too few prompts for a generation batch: TRL would make no step."""
    size, group = cast(int, config.generation_batch_size), cast(int, config.num_generations)
    if prompts < size // group:
        raise InputError(
            f"grpo: {prompts} prompts do not fill a generation batch of {size} completions, which takes "
            f"{size // group} prompts with num_generations: {group}; lower per_device_train_batch_size (now "
            f"{config.per_device_train_batch_size}) or steps_per_generation (now {config.steps_per_generation}; by "
            f"default gradient_accumulation_steps), or give more rows"
        )


def with_room(
    rows: Dataset, tokenizer: Any, config: GRPOConfig, positions: int | None, say: bool = True
) -> tuple[Dataset, int]:
    """(the rows whose prompt leaves room for a whole completion, how many do not); the log says how many, and why.

    say: False: not in the log. Raises InputError where there are none.
    """
    given = config.vllm_max_model_length if config.use_vllm else None
    limit = min((n for n in (positions, given) if n is not None), default=None)
    new = config.max_completion_length
    if limit is None or new is None:
        return rows, 0
    kwargs: Any = config.chat_template_kwargs or {}
    lengths = [
        len(prompt_ids({**row, "chat_template_kwargs": {**kwargs, **row_kwargs(row)}}, tokenizer))
        for row in cast(Sequence[dict[str, Any]], rows)
    ]
    keep = [i for i, length in enumerate(lengths) if length + new <= limit]
    what = f"grpo.max_completion_length: {new} tokens behind the prompt are more than the {limit} that the model takes"
    if not keep:
        raise InputError(f"{what}, for each of {len(rows)} rows; lower it to at most {max(limit - min(lengths), 0)}")
    if len(keep) < len(rows):
        if say:
            log.warning("grpo: %d of %d rows left out: %s; lower it to keep them (the longest prompt has %d tokens)",
                        len(rows) - len(keep), len(rows), what, max(lengths))  # fmt: skip
        rows = rows.select(keep)
    return rows, len(lengths) - len(keep)


def check_rewards(rows: Dataset, rewards: Sequence[Reward]) -> None:
    """Say how many prompts have no answer for the rewards that need one.

    InputError where none has, and for a reward that cannot be called with the rows' columns.
    """
    columns = [name for name in rows.column_names if name not in ("prompt", *NOT_FOR_REWARDS)]
    for reward in rewards:
        if not isinstance(reward, nn.Module):
            check_call(reward, [*columns, "trainer_state", "log_extra", "log_metric"], "grpo.rewards")
    names = {getattr(reward, "__name__", str(reward)): reward for reward in rewards}
    check_answers(names, rows, "grpo.rewards", "prompts")


def _say_rewards(trainer: PartitionedGRPOTrainer) -> None:
    """What of the rewards taught nothing, where something did not."""
    tally = trainer.tally
    for reward in trainer.reward_funcs:
        strange = sum(processes.gather(getattr(reward, "not_finite", 0)))
        if isinstance(reward, CheckedReward) and strange:
            log.warning("grpo: %d values of %s were nan or infinite and counted as None", strange, reward.name)
    if tally.all_equal:
        log.warning("grpo: %s", tally.said(trainer.remedies()))
    elif tally.equal:
        log.info("grpo: in %d of %d groups the completions' rewards were equal, so these taught nothing",
                 tally.equal, tally.groups)  # fmt: skip


def grpo(
    model: PeftModel,
    tokenizer: Any,
    dataset: Dataset,
    partition: Partition,
    config: GRPOConfig,
    rewards: Sequence[Reward | str],
    systems: Sequence[int] = (2,),
    resume: bool = False,
    longest_first: bool = True,
    rollout_batch_size: int | None = None,
    logprob_tokens: int | None = None,
    activation_offloading: bool = False,
    watched: Dataset | None = None,
    watch_rise: float = 0.1,
    watched_turns: Turns = "last",
) -> tuple[PartitionedGRPOTrainer, Trained]:
    """Train the partition's "grpo" elements of `model` in place on the prompts of `systems`.

    Args:
        model: stage 1's result. dataset: rows with prompt and what the rewards read (`answer`, ...); where it has the
            columns `system` and `split`, only train rows of `systems` are used. Of rows with one `id`, which is a
            prompt's, the first is asked.
        config: TRL's own; its `output_dir` holds the checkpoints. resume: go on from the last whole checkpoint there.
        rewards: TRL reward functions, `f(prompts, completions, completion_ids, <columns>, **kw) -> list[float | None]`,
            also `async`, names of `lorapar.rewards`, or "module:function".
        longest_first: roll out the longest prompts to `max_completion_length`, and take them through forward and
            backward, before the first step (rehearsal.py).
        rollout_batch_size: completions generated at once; None: all that one generation batch holds.
        logprob_tokens: tokens whose log-probabilities are taken at once; None: 256 on a CPU, TRL's 4,096 on a GPU.
        activation_offloading: what the backward needs waits in pinned host memory (a GPU).
        watched: rows of the other system, with prompt and completion, that no stage trains on. Their mean loss is
            computed before the first step and at each checkpoint, and the model ends as one of the checkpoints
            (watching.py has the rule; `Trained.watched` says which). Training itself is not changed.
        watch_rise: by how much that loss may rise above its value at the start, in nats an answer token.
        watched_turns: whose tokens that loss is of, as `turns` of `lorapar.sft`.

    Rows whose prompt leaves the model no positions for a whole completion are left out; the log says how many.
    Returns the trainer and what it did. Raises InputError; RewardFailed where a reward function fails; NothingLearned
    where every group's rewards were equal and nothing moved; FrozenElementsChanged where the proof at the end fails.
    """
    check_trainer_keys("grpo", vars(config))
    check_engine(config, given_form(model.config))
    check_generation(config, len(tokenizer))
    check_value(GRPOStageConfig, "watch_rise", watch_rise)
    watch = None if watched is None else _watch(model, tokenizer, watched, config, systems, watch_rise, watched_turns)
    labelled = rows_of(dataset, systems)
    once = once_a_prompt(labelled)
    rows, left_out = with_room(once, tokenizer, config, positions_of(model.config))
    rewards = resolve_rewards(rewards)
    check_rewards(rows, rewards)
    check_prompts(len(rows), config)
    examples = rows.remove_columns([name for name in NOT_FOR_REWARDS if name in rows.column_names])
    trainer = PartitionedGRPOTrainer(
        model=model,
        reward_funcs=cast(Any, rewards),
        args=config,
        train_dataset=examples,
        processing_class=tokenizer,
        rollout_batch_size=rollout_batch_size,
        logprob_tokens=logprob_tokens,
        activation_offloading=activation_offloading,
    )
    trainer.longest_first, trainer.watch = longest_first, watch
    reference = "the adapter as this stage received it" if config.beta else "none (beta is 0)"
    log.info("grpo: %d prompts, reference model: %s", len(examples), reference)
    if len(once) < len(labelled):
        log.info("grpo: %d further completions of these prompts are not used", len(labelled) - len(once))
    try:
        trained = train(trainer, partition, "grpo", len(examples), resume)
    except NothingMoved as error:
        tally = trainer.tally
        tally.ended = sum(processes.gather(tally.ended))
        if config.mask_truncated_completions and tally.ended < tally.completions:
            raise NothingLearned(
                f"grpo: nothing was trained: {tally.ended} of {tally.completions} completions ended, and "
                "mask_truncated_completions: true learns from no other; raise grpo.max_completion_length (now "
                f"{config.max_completion_length}), or set grpo.mask_truncated_completions to false"
            ) from error
        if not tally.all_equal:
            raise
        raise NothingLearned(f"grpo: nothing was trained: {tally.said(trainer.remedies())}") from error
    _say_rewards(trainer)
    trained.rollout_seconds = trainer.rollout_seconds
    trained.left_out = {"no_room_for_a_completion": left_out} if left_out else {}
    return trainer, trained
