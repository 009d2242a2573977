#!/bin/sh
# Serve's HAProxy with its metrics and its statistics on loopback: Serve's template has them listen on every address,
# and only their ports can be set. The gateway listens where serve_config.yaml says (ROUTER_GATEWAY, host:port): by
# default Serve takes every address in HAProxy mode. Serve runs this in place of the binary (deployments/dataplane.py),
# with `-f CONFIG`.
# Who does not send a request to its end within 10 s is not waited for, and takes no place of an ingress: Serve has no
# setting for that either. A body larger than HAProxy's buffer (16 kB) goes on as it comes; the gateway bounds those
# itself (deployments/guard.py). Other methods mean nothing to the gateway, and Serve would count each.
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
if ! grep -q '^ *timeout http-request ' "$config"; then
    sed -i '/^defaults$/r /dev/stdin' "$config" << 'END'
    timeout http-request 10s
END
    sed -i '/^frontend http_frontend$/r /dev/stdin' "$config" << 'END'
    http-error status 405 content-type application/json string '{"error": {"message": "send GET, HEAD, POST, DELETE or OPTIONS; see /docs for what there is", "type": "invalid_request_error", "param": null, "code": "method_not_allowed"}}' hdr allow "GET, HEAD, POST, DELETE, OPTIONS"
    http-error status 408 content-type application/json string '{"error": {"message": "the request did not arrive within 10 seconds; send it again", "type": "invalid_request_error", "param": null, "code": "request_timeout"}}'
    http-request deny deny_status 405 unless { method GET HEAD POST DELETE OPTIONS }
    http-request wait-for-body time 10s if { req.hdr(content-length) -m found } or { req.hdr(transfer-encoding) -m found }
END
fi
exec "$ROUTER_HAPROXY" "$@"
