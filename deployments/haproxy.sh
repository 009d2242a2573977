#!/bin/sh
# Serve's HAProxy with its metrics and its statistics on loopback: Serve's template has them listen on every address,
# and only their ports can be set. The gateway listens where serve_config.yaml says (ROUTER_GATEWAY, host:port): by
# default Serve takes every address in HAProxy mode. Serve runs this in place of the binary (deployments/dataplane.py),
# with `-f CONFIG`.
# Without any server, as Serve's first configuration is, the gateway would only say 404, beside an understudy that can
# serve (understudy.py): so it is not opened yet.
set -eu
config=
previous=
for argument in "$@"; do
    if [ "$previous" = -f ]; then config=$argument; fi
    previous=$argument
done
listen() { # host, port
    sed -i -E "s/^( *bind) +[^ ]*:$2( .*)?$/\1 $1:$2\2/" "$config"
}
listen 127.0.0.1 "$RAY_SERVE_HAPROXY_METRICS_PORT"
listen 127.0.0.1 "$RAY_SERVE_HAPROXY_STATS_PORT"
if [ -n "${ROUTER_GATEWAY:-}" ]; then
    port=${ROUTER_GATEWAY##*:}
    if grep -q '^ *server ' "$config"; then
        listen "${ROUTER_GATEWAY%:*}" "$port"
    else
        sed -i -E "s|^( *bind) +[^ ]*:$port( .*)?$|\1 unix@$config.closed|" "$config"
    fi
fi
exec "$ROUTER_HAPROXY" "$@"
