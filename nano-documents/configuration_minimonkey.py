"""Says how to load these weights, whose code is that of the repository's root."""

raise ValueError(
    "This folder holds weights alone; its code is in the folder above. Load it from there: "
    'AutoModel.from_pretrained(REPOSITORY, subfolder="nano-documents", trust_remote_code=True), and the processor of '
    "REPOSITORY, with a preset for many tiles."
)
