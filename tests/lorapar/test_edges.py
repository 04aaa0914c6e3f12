"""The edges of a run: settings that only the stage's own configuration shows, places to write to, signals."""

import pytest

from .driver import refused


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("sft.fp16", "true", "sft.fp16: got True, expected false on a CPU"),
        ("sft.eval_on_start", "true", "sft.eval_on_start: got True, expected false where eval_strategy is no"),
        ("sft.save_strategy", "best", "sft.save_strategy: got 'best', expected steps, epoch or no"),
        ("sft.lr_scheduler_kwargs", "{num_cycles: 2}", "sft.lr_scheduler_kwargs: got {'num_cycles': 2}: "),
        ("sft.report_to", "tensorboard", "sft.report_to: 'tensorboard' is not installed here"),
        ("sft.use_liger_kernel", "true", "liger-kernel, which is not installed"),
        ("grpo.use_vllm", "true", "vllm, which is not installed"),
        ("grpo.loss_type", "bogus", "grpo.loss_type"),
        ("grpo.num_generations", "3", "num_generations (3)"),
        ("sft.push_to_hub", "true", "sft.push_to_hub: got True: a run uploads nothing"),
    ],
)
def test_a_setting_of_a_trainer_that_cannot_work_here_is_refused_before_a_byte_is_written(
    recipe_file, tmp_path, key, value, says
):
    refused("run", recipe_file, "--output_dir", tmp_path / "run", f"--{key}", value, says=(says,), alone=True)
    assert not (tmp_path / "run").exists()
