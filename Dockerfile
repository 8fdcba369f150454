# A server of what `hf-moebert export` wrote, on ONNX Runtime: no torch, no transformers. Folders in /models are served:
#   docker build -t hf-moebert . && docker run --read-only --tmpfs /tmp -p 8000:8000 \
#     -v ./graphs:/models/student:ro hf-moebert /models/student
# With `--target torch` the image also serves checkpoints, and is four times as large.
FROM python:3.12-slim AS packages
RUN python -m venv --without-pip /opt/venv \
    && pip --python /opt/venv/bin/python install --no-cache-dir \
        onnxruntime tokenizers numpy safetensors lazy_loader typer fastapi uvicorn prometheus-client
WORKDIR /src
COPY setup.py pyproject.toml README.md hf_moebert_main.py ./
COPY hf_moebert hf_moebert
# Its own requirements are for training
RUN pip --python /opt/venv/bin/python install --no-cache-dir --no-deps .

FROM packages AS torch-packages
RUN pip --python /opt/venv/bin/python install --no-cache-dir \
        --index-url https://download.pytorch.org/whl/cpu "torch>=2.11" \
    && pip --python /opt/venv/bin/python install --no-cache-dir ".[serve,runtime]"

FROM python:3.12-slim AS server
# Nothing is written but below /tmp, and no model is fetched: those that are served are mounted
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["hf-moebert", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/models/student"]

FROM server AS torch
COPY --from=torch-packages /opt/venv /opt/venv

FROM server
COPY --from=packages /opt/venv /opt/venv
