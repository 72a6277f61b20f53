# The page and the command on a CPU, from a checkout:
#   docker build -f integrations/docker/cpu.Dockerfile -t fpe .
FROM python:3.12-slim

WORKDIR /fpe
COPY setup.py pyproject.toml constraints.txt README.md LICENSE ./
COPY fpe_kernels fpe_kernels
COPY fpe_pipeline fpe_pipeline
RUN pip install --no-cache-dir -c constraints.txt \
      --extra-index-url https://download.pytorch.org/whl/cpu '.[app]' \
 && useradd --create-home user && mkdir /out && chown user /out

USER user
WORKDIR /home/user
VOLUME /out
EXPOSE 7860
ENTRYPOINT ["fpe"]
CMD ["app", "--host", "0.0.0.0", "--port", "7860", "-o", "/out"]
