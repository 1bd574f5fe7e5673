"""What updates reveal of the texts that they were trained on: how many words, and not which."""

from fedllm_sec.attacks.reconstruction.revealed import RevealedText
from fedllm_sec.audit.header import Fault
from fedllm_sec.audit.intake import add
from fedllm_sec.audit.judging import ALONE, Work
from fedllm_sec.federation.offline_reconstruction import Told, reconstruct_adapter
from fedllm_sec.updates.errors import InputError
from fedllm_sec.updates.sources import ADAPTER_FILE


def check_privacy(work: Work) -> None:
    """Try to read words from each update, as `lora_tokens` does.

    Raises:
        InputError: without the base's weights and the global adapter.
    """
    context = work.context
    if context.base is None or context.reference is None or not context.base.weights:
        raise InputError("what updates reveal is only told with --global and with --base FOLDER, weights included")
    for opened in work.opened:
        if opened.source is None or opened.has(*ALONE, "SH002", "KY006", "KY007"):
            continue
        try:
            result = reconstruct_adapter(
                opened.subject.path, context.reference, str(context.base.folder), "lora_tokens", {}, Told()
            )
        except InputError as error:
            work.notes.append(f"what {opened.name} reveals: {str(error)[:200]}")
            continue
        found = result.found
        assert isinstance(found, RevealedText)
        if found.certain and len(found.tokens) >= context.policy.thresholds.revealed:
            text = f"reveals {len(found.tokens)} distinct tokens that it was trained on, for certain: {found.why}"
            text = f"{text} (certificate {found.certificate:.4f})"
            measured, least = len(found.tokens), context.policy.thresholds.revealed
            add(opened, context.policy, [Fault("R001", text, None, measured, least)], ADAPTER_FILE)
