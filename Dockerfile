# One static binary in an empty image, as nobody.
#
#   docker build -t tailcar .
#   docker run --rm -e TS_AUTHKEY tailcar run --listen 0.0.0.0:1080 --allow-non-loopback

FROM rust:1.95-slim AS build
WORKDIR /src
COPY . .
RUN host=$(rustc -vV | sed -n 's/^host: //p') && \
    RUSTFLAGS='-C target-feature=+crt-static' cargo build --release --locked --bin tailcar --target "$host" && \
    cp "target/$host/release/tailcar" /tailcar

FROM scratch
COPY --from=build /tailcar /tailcar
USER 65532:65532
ENTRYPOINT ["/tailcar"]
CMD ["run"]
