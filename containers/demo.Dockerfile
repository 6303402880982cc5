# The demo page (docs/demo.md) on a CPU:
#
#     docker build -f containers/demo.Dockerfile -t minimonkey-demo .
#     docker run --rm -p 7860:7860 minimonkey-demo
#
# For a GPU: --build-arg TORCH_INDEX=https://pypi.org/simple, and docker run --gpus all.
FROM python:3.12-slim-bookworm

ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ENV PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1 \
    GRADIO_TEMP_DIR=/tmp/gradio \
    MPLCONFIGDIR=/tmp/matplotlib

SHELL ["/bin/bash", "-o", "pipefail", "-c"]
RUN useradd --create-home --uid 1000 visitor

WORKDIR /src
COPY . .
# The locked versions, but for Pillow: gradio wants an older one. Of equal versions pip takes those of TORCH_INDEX, which carry a
# suffix such as +cpu.
RUN grep --invert-match '^pillow==' requirements/lock.txt > constraints.txt \
    && pip install --extra-index-url "$TORCH_INDEX" --constraint constraints.txt ".[demo]" \
    && rm -r /src/*

USER 1000
WORKDIR /home/visitor
EXPOSE 7860
HEALTHCHECK --start-period=60s CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:7860/')"]
ENTRYPOINT ["minimonkey", "demo", "--host", "0.0.0.0"]
