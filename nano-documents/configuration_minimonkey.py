"""Says how these weights load: their code and their processor are those of the repository, one folder up."""

raise ImportError(
    "nano-documents holds weights alone; their code and processor are in the folder above. Load them from there: "
    'AutoModel.from_pretrained(REPOSITORY, subfolder="nano-documents", trust_remote_code=True) and '
    "AutoProcessor.from_pretrained(REPOSITORY, trust_remote_code=True), where REPOSITORY is the Hub id or that folder."
)
