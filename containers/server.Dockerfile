# vLLM's server with an API like OpenAI's (docs/serving.md) on a GPU:
#
#     docker build -f containers/server.Dockerfile -t minimonkey-server .
#     docker run --rm --gpus all -p 8000:8000 -v "$PWD/MiniMonkey-2B:/model:ro" minimonkey-server
#
# The model brings its own code, which vLLM's transformers back end runs; options of `vllm serve` can follow.
ARG VLLM=v0.33.0
FROM vllm/vllm-openai:${VLLM}

ENV HF_HUB_OFFLINE=1 \
    VLLM_NO_USAGE_STATS=1

# The package beside vLLM, whose own versions of everything stay.
WORKDIR /src
COPY . .
RUN python3 -m pip install --no-cache-dir --no-deps . && rm -r /src/*

WORKDIR /
EXPOSE 8000
HEALTHCHECK --start-period=600s CMD ["python3", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/health')"]
ENTRYPOINT ["vllm", "serve", "/model", "--served-model-name", "minimonkey", "--host", "0.0.0.0", "--trust-remote-code", \
    "--max-model-len", "16384", "--limit-mm-per-prompt", "{\"image\": 8}"]
