# The page and the command on an NVIDIA GPU, from a checkout; the machine has the driver and NVIDIA's container toolkit:
#   docker build -f integrations/docker/cuda.Dockerfile -t fpe-cuda .
FROM python:3.12-slim

# Triton builds the launcher of each kernel with a C compiler, on first use.
RUN apt-get update \
 && apt-get install -y --no-install-recommends gcc libc6-dev \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /fpe
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY fpe_kernels fpe_kernels
COPY fpe_pipeline fpe_pipeline
# PyTorch's wheels for Linux bring the CUDA libraries with them.
RUN pip install --no-cache-dir -c constraints.txt '.[app]' \
 && useradd --create-home user && mkdir /out && chown user /out

ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
USER user
WORKDIR /home/user
VOLUME /out
EXPOSE 7860
ENTRYPOINT ["fpe"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860", "-o", "/out"]
