# syntax=docker/dockerfile:1
# The image of worker, bridge and all commands: one binary, certificates and time zones, no shell, not root.
#
#   docker build --tag postroom:dev .
#   docker build --build-arg REVISION=$(git rev-parse HEAD) --build-arg SOURCE_DATE_EPOCH=$(git log -1 --format=%ct) .
#
# Two builds of one commit give the same binary: same paths, locked crates, no time in it. Base images are pinned by tag
# here; .github/renovate.json keeps the tags, and pins their digests. Why glibc and distroless: docs/decisions/image.md.

ARG RUST_VERSION=1.95.0

FROM rust:${RUST_VERSION}-slim-trixie AS build
WORKDIR /build
ENV CARGO_INCREMENTAL=0 \
    CARGO_PROFILE_RELEASE_STRIP=debuginfo \
    CARGO_TARGET_DIR=/build/target

# Crates alone: this layer changes with the lock file only. The empty library and binary stand in for ours.
COPY Cargo.toml Cargo.lock build.rs ./
COPY bench/Cargo.toml bench/
COPY testkit/Cargo.toml testkit/
RUN mkdir -p src bench/src bench/benches testkit/src schema/migrations \
    && touch src/lib.rs testkit/src/lib.rs bench/src/main.rs bench/benches/stages.rs \
    && echo 'fn main() {}' > src/main.rs \
    && cargo build --release --locked --bin postroom

COPY schema schema
COPY src src
# Newer than what stood in for them, whatever the time in the source is.
RUN touch src/lib.rs src/main.rs build.rs \
    && cargo build --release --locked --bin postroom \
    && install -D target/release/postroom /image/usr/local/bin/postroom
COPY LICENSE-APACHE LICENSE-MIT /image/usr/share/doc/postroom/

FROM gcr.io/distroless/cc-debian13:nonroot
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Postroom" \
      org.opencontainers.image.description="Outbound mail worker for RabbitMQ and Postgres" \
      org.opencontainers.image.source="https://github.com/postroom/postroom" \
      org.opencontainers.image.documentation="https://github.com/postroom/postroom/tree/main/docs" \
      org.opencontainers.image.licenses="MIT OR Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.base.name="gcr.io/distroless/cc-debian13:nonroot"
COPY --from=build /image/ /
# By number: Kubernetes cannot tell from a name that it is not root.
USER 65532:65532
# /livez, /readyz, /metrics
EXPOSE 9090
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --start-interval=1s --retries=3 \
    CMD ["/usr/local/bin/postroom", "healthcheck"]
ENTRYPOINT ["/usr/local/bin/postroom"]
CMD ["worker"]
