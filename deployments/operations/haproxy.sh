#!/bin/sh
# Starts Serve's HAProxy after it has changed the configuration that Serve wrote. Serve runs this script in place of the
# binary (deployments/operations/haproxy.py), with `-f CONFIG`. Serve has no setting for any of these changes:
# - Metrics and statistics listen on loopback. Serve's template has them listen on every address.
# - The gateway listens where serve_config.yaml says (ROUTER_GATEWAY, host:port). In HAProxy mode Serve takes every
#   address.
# - A request has to arrive within 10 s, and reaches an ingress only then. A body larger than HAProxy's buffer (16 kB) is
#   passed on as it comes; the gateway bounds the time of those itself (deployments/access/middleware.py).
# - Methods that the gateway does not have are refused, because Serve would make a metric of each.
# - Without a server, as in Serve's first configuration, the gateway's port stays closed. HAProxy could only answer 404,
#   while the standby proxy (standby_proxy.py) can serve.
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
