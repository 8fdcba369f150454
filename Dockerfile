# A server of the models in /models: docker build -t hf-moebert . && docker run --read-only --tmpfs /tmp -p 8000:8000 \
#     -v ./student:/models/student:ro hf-moebert /models/student
FROM python:3.12-slim AS build
WORKDIR /src
COPY setup.py pyproject.toml README.md hf_moebert_main.py ./
COPY hf_moebert hf_moebert
RUN python -m venv /opt/venv \
    && /opt/venv/bin/pip install --no-cache-dir --index-url https://download.pytorch.org/whl/cpu "torch>=2.11" \
    && /opt/venv/bin/pip install --no-cache-dir ".[serve]"

FROM python:3.12-slim
COPY --from=build /opt/venv /opt/venv
# Nothing is written but below /tmp, and no model is fetched: those that are served are mounted
ENV PATH=/opt/venv/bin:$PATH HOME=/tmp HF_HOME=/tmp/huggingface HF_HUB_OFFLINE=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s --retries=3 \
    CMD ["python", "-c", "from urllib.request import urlopen; urlopen('http://127.0.0.1:8000/health', timeout=4)"]
ENTRYPOINT ["hf-moebert", "serve", "--host", "0.0.0.0", "--port", "8000"]
CMD ["/models/student"]
