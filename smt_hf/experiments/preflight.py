"""What is wrong with a run and can be known before anything is read or written."""

import warnings

from transformers.integrations import get_reporting_integration_callbacks

from smt_hf.errors import InputError
from smt_hf.training.adapters import LoraSettings
from smt_hf.training.arguments import PhaseArguments
from smt_hf.training.launch import launched_sharded
from smt_hf.training.phases import arm_name, check_named_checkpoint, lay_out
from smt_hf.upload import check_hub_access

from .run_arguments import ParsedRun
from .run_folder import check_output_dir


def check_run(parsed: ParsedRun) -> str | None:
    """Check everything about a pretraining run but its data, and lay out its phases, in place.

    Returns:
        The repository of the Hub to which the student is to be sent, if any.

    Raises:
        InputError: bad input, with the way to mend it.
    """
    run, phases, rival = parsed.run, parsed.phases, parsed.rival
    if rival is not None and rival.warmup_steps >= 1:
        raise InputError(
            "`bptt_warmup_steps` must be a share of the phase, below 1, with `compare_bptt`: BPTT ends by the seconds."
        )
    if run.use_peft:
        lora_settings(run)
        if launched_sharded() or any(arguments.deepspeed or arguments.fsdp for arguments in phases):
            raise InputError("LoRA phases run on one process or under DDP: leave DeepSpeed, FSDP or `use_peft` out.")
        if "dmt" not in [arguments.phase for arguments in phases[1:]]:
            raise InputError(
                "`use_peft` trains LoRA layers in dmt phases that follow another: give `--phases smt,dmt`, or leave it "
                "out."
            )
    check_output_dir(run)
    lay_out(phases, run.output_dir)
    if isinstance(run.resume, str):
        check_named_checkpoint(phases, run.resume)
    if rival is not None and arm_name(phases) == arm_name([rival]):
        warnings.warn("the pipeline is BPTT itself: there is nothing to compare it with.", stacklevel=2)
        parsed.rival = None
    if phases[0].phase == "dmt" and phases[0].process_index == 0:
        warnings.warn(
            "the first phase is dmt: the student will imitate a teacher that was never trained.", stacklevel=2
        )
    check_trackers(phases)
    return pushed_repository(phases)


def lora_settings(run) -> LoraSettings | None:
    """The LoRA layers that a run asks for by `use_peft`, `lora_r`, `lora_alpha` and `lora_parts`, if it does."""
    return LoraSettings(run.lora_r, run.lora_alpha, parts=tuple(run.lora_parts.split(","))) if run.use_peft else None


def check_trackers(phases: list[PhaseArguments]) -> None:
    """Raises:
    InputError: a tracker of `report_to` is unknown or not installed.
    """
    for arguments in phases:
        try:
            for tracker in get_reporting_integration_callbacks(arguments.report_to):
                tracker()
        except (ValueError, RuntimeError, ImportError) as error:
            raise InputError(f"`report_to`: {error} Or pass `--report_to none`.") from error


def pushed_repository(phases: list[PhaseArguments]) -> str | None:
    """The repository that `--push_to_hub --hub_model_id` names, if any.

    Raises:
        InputError: none is named, or not one for all phases; or the account may not write there.
    """
    pushing = [arguments for arguments in phases if arguments.push_to_hub]
    if not pushing:
        return None
    names = {arguments.hub_model_id for arguments in pushing}
    if len(names) > 1 or not str(pushing[0].hub_model_id).count("/"):
        raise InputError("`push_to_hub` needs one `--hub_model_id user/name` for the whole run.")
    if pushing[0].process_index == 0:
        check_hub_access(str(pushing[0].hub_model_id), pushing[0].hub_token, pushing[0].hub_private_repo)
    return str(pushing[0].hub_model_id)
