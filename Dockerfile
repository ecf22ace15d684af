# The operator's and the trainer's image. Builds alike with docker and with buildah:
#   docker build --target operator -t REGISTRY/qlora-operator .
#   docker build --target trainer  -t REGISTRY/qlora-trainer  .
# BASE must bring python3 with venv and the certificate authorities. Where packages come from a mirror or through a
# proxy with its own authority, give `--secret id=pip.conf,src=...` and `--secret id=ca.pem,src=...` (cert=/run/ca.pem in
# the former): they are mounted while pip runs and leave no trace.
ARG BASE=docker.io/library/python:3.11-slim-bookworm

# Dependencies: one layer that changes only with the lock. pip is used from outside the environment and is not in it.
# The Kubernetes client's generated code (75 MB of source) is shipped compiled only.
FROM ${BASE} AS operator-dependencies
COPY requirements/operator.lock /opt/requirements.lock
RUN --mount=type=secret,id=pip.conf,target=/run/pip.conf --mount=type=secret,id=ca.pem,target=/run/ca.pem \
    export PIP_CONFIG_FILE=/run/pip.conf \
    && python3 -m venv --without-pip /opt/venv && python3 -m venv /tmp/installer \
    && /tmp/installer/bin/pip --python /opt/venv/bin/python install \
        --no-cache-dir --no-compile --only-binary :all: --require-hashes --requirement /opt/requirements.lock \
    && cd /opt/venv/lib/python3*/site-packages && find . -type d -name tests -prune -exec rm -r {} + \
    && python3 -m compileall -q -b -j 0 --invalidation-mode unchecked-hash kubernetes/client kubernetes/aio/client \
    && find kubernetes/client kubernetes/aio/client -name '*.py' -delete \
    && python3 -m compileall -q -j 0 --invalidation-mode unchecked-hash . \
    && echo 'qlora:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && rm -rf /tmp/installer
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp

# Compiling may fail here and there: torch carries files for later Pythons.
FROM ${BASE} AS trainer-dependencies
COPY requirements/trainer.lock /opt/requirements.lock
RUN --mount=type=secret,id=pip.conf,target=/run/pip.conf --mount=type=secret,id=ca.pem,target=/run/ca.pem \
    export PIP_CONFIG_FILE=/run/pip.conf \
    && python3 -m venv --without-pip /opt/venv && python3 -m venv /tmp/installer \
    && /tmp/installer/bin/pip --python /opt/venv/bin/python install \
        --no-cache-dir --no-compile --only-binary :all: --require-hashes --requirement /opt/requirements.lock \
    && { python3 -m compileall -qq -j 0 --invalidation-mode unchecked-hash /opt/venv/lib || true; } \
    && echo 'qlora:x:65532:65532::/tmp:/usr/sbin/nologin' >> /etc/passwd \
    && rm -rf /tmp/installer
ENV PATH=/opt/venv/bin:$PATH PYTHONPATH=/app PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOME=/tmp

# Attention kernels beside torch's own: none by default. FlashAttention comes as wheels for one torch, CUDA and Python
# each, which no lock can name: give what pip is to install. flex_attention compiles its kernels where it runs.
#   --build-arg FLASH_ATTENTION="einops https://…/flash_attn-….whl"
#   --build-arg COMPILER="gcc libc6-dev"
# Jobs may ask for quantization.type hqq where it is there (then say so in the chart's trainer.backEnds); pip builds it,
# for it comes as source, and what else it names is in the lock already.
#   --build-arg HQQ="hqq==0.2.8.post1 einops==0.8.2 termcolor==3.3.0"
FROM trainer-dependencies AS trainer-kernels
ARG FLASH_ATTENTION=
ARG COMPILER=
ARG HQQ=
RUN --mount=type=secret,id=pip.conf,target=/run/pip.conf --mount=type=secret,id=ca.pem,target=/run/ca.pem \
    export PIP_CONFIG_FILE=/run/pip.conf \
    && if [ -n "$FLASH_ATTENTION$HQQ" ]; then \
        python3 -m venv /tmp/installer \
        && /tmp/installer/bin/pip --python /opt/venv/bin/python install --no-cache-dir --no-deps $FLASH_ATTENTION $HQQ \
        && rm -rf /tmp/installer; \
    fi \
    && if [ -n "$COMPILER" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends $COMPILER && rm -rf /var/lib/apt/lists/*; \
    fi

# The project's code, compiled: the root file system of the pods is read-only.
FROM ${BASE} AS operator-code
COPY crds/qlora_api /app/qlora_api
COPY operator/qlora_operator /app/qlora_operator
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /app

FROM ${BASE} AS trainer-code
COPY crds/qlora_api /app/qlora_api
COPY trainer/qlora_trainer /app/qlora_trainer
RUN python3 -m compileall -q --invalidation-mode unchecked-hash /app

FROM operator-dependencies AS operator
COPY --from=operator-code /app /app
USER 65532:65532
ENTRYPOINT ["python", "-m", "qlora_operator"]

FROM trainer-kernels AS trainer
COPY --from=trainer-code /app /app
USER 65532:65532
ENTRYPOINT ["python", "-m", "qlora_trainer"]
