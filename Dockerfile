# docker build -t sdlora .    with CUDA: docker build -t sdlora --build-arg TORCH=cu128 .
FROM python:3.12-slim
ARG TORCH=cpu
WORKDIR /sdlora
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY configs configs
COPY sdlora sdlora
RUN pip install --no-cache-dir --extra-index-url https://download.pytorch.org/whl/${TORCH} -c constraints.txt .
ENV SDLORA_CACHE=/workspace/.cache/sdlora HF_HOME=/workspace/.cache/huggingface
WORKDIR /workspace
ENTRYPOINT ["sdlora"]
