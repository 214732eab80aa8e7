"""What the libraries below have to say, left out: what matters of it is an error of ours."""


def quiet_libraries(threads: int | None = None) -> None:
    """No progress bars, notes or warnings of theirs; also sets torch's CPU threads if given."""
    import logging
    import warnings

    import torch
    from transformers.utils import logging as transformers_logging

    if threads is not None:
        torch.set_num_threads(threads)
    libraries = r"(transformers|peft|accelerate|torch|bitsandbytes)\b"
    warnings.filterwarnings("ignore", module=libraries)
    for name in ("bitsandbytes", "torch.distributed", "accelerate"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
