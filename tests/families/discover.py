"""Which architectures and tasks the lane runs: one or two telling tasks of every model type in transformers' auto mappings."""

from transformers.models.auto import modeling_auto

ENCODERS = ("SEQUENCE_CLASSIFICATION", "TOKEN_CLASSIFICATION", "QUESTION_ANSWERING", "MASKED_LM", "MULTIPLE_CHOICE")
OTHERS = (
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "VIDEO_CLASSIFICATION",
    "DEPTH_ESTIMATION",
    "OBJECT_DETECTION",
    "ZERO_SHOT_IMAGE_CLASSIFICATION",
    "AUDIO_CLASSIFICATION",
    "CTC",
    "SPEECH_SEQ_2_SEQ",
    "IMAGE_TEXT_TO_TEXT",
)


def mapping(task: str) -> dict[str, str]:
    return getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")


def discovered() -> list[tuple[str, str]]:
    """Pairs (task, model type) in a fixed order."""
    chosen: dict[tuple[str, str], None] = {}
    for task in OTHERS:
        for model_type in mapping(task):
            chosen[task, model_type] = None
    seen = {model_type for _, model_type in chosen}
    multimodal = seen | set(mapping("MULTIMODAL_LM")) | set(mapping("SPEECH_SEQ_2_SEQ"))
    for model_type in mapping("SEQ_TO_SEQ_CAUSAL_LM"):
        if model_type not in multimodal:
            chosen["SEQ_TO_SEQ_CAUSAL_LM", model_type] = None
    masked, causal = mapping("MASKED_LM"), mapping("CAUSAL_LM")
    for model_type in causal:
        if model_type not in multimodal and model_type not in masked:
            chosen["CAUSAL_LM", model_type] = None
    text = dict.fromkeys(t for task in (*ENCODERS, "CAUSAL_LM") for t in mapping(task) if t not in multimodal)
    for number, model_type in enumerate(text):
        # two of an encoder's tasks in turn, and one beside the language model's of a decoder
        own = [task for task in ENCODERS if model_type in mapping(task)]
        for k in range(min(2 if model_type in masked else 1, len(own))):
            chosen[own[(number + 2 * k) % len(own)], model_type] = None
    for model_type in mapping("NEXT_SENTENCE_PREDICTION"):
        chosen["NEXT_SENTENCE_PREDICTION", model_type] = None
    return list(chosen)
