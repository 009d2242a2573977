#!/bin/sh
# Starts Serve's HAProxy after it has changed the configuration that Serve wrote. Serve runs this script in place of the
# binary (deployments/operations/haproxy.py), with `-f CONFIG`. Serve has no setting for any of these changes:
# - Metrics and statistics listen on loopback. Serve's template has them listen on every address.
# - The gateway listens where serve_config.yaml says (ROUTER_GATEWAY, host:port). In HAProxy mode Serve takes every
#   address.
# - A request has to arrive within 10 s, and reaches an ingress only then. A body larger than HAProxy's buffer (32 kB) is
#   passed on as it comes; the gateway bounds the time of those itself (deployments/access/middleware.py).
# - Methods that the gateway does not have are refused, because Serve would make a metric of each.
# - A request that may have had an effect is not sent to a second ingress once it has reached one: it may have killed it.
# - Errors have OpenAI's shape, as those of deploy/haproxy. A head that HAProxy cannot parse, or that exceeds its buffer
#   (32 kB), gets HAProxy's plain 400, which no setting changes.
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
    sed -i -E '/^ *errorfile 50[234] /d' "$config"
    sed -i -E 's/^( *)(tune\.bufsize .*)$/\1\2\n\1tune.http.maxhdr 256/' "$config"
    sed -i '/^defaults$/r /dev/stdin' "$config" << 'END'
    timeout http-request 10s
    http-error status 405 content-type application/json string '{"error": {"message": "send GET, HEAD, POST, DELETE or OPTIONS; see /docs for what there is", "type": "invalid_request_error", "param": null, "code": "method_not_allowed"}}' hdr allow "GET, HEAD, POST, DELETE, OPTIONS"
    http-error status 408 content-type application/json string '{"error": {"message": "the request did not arrive within 10 seconds; send it again", "type": "invalid_request_error", "param": null, "code": "request_timeout"}}'
    http-error status 500 content-type application/json string '{"error": {"message": "the proxy failed to handle this request", "type": "server_error", "param": null, "code": "proxy_failed"}}'
    http-error status 502 content-type application/json string '{"error": {"message": "the gateway broke off before it answered; send the request again", "type": "server_error", "param": null, "code": "gateway_failed"}}' hdr retry-after 1
    http-error status 503 content-type application/json string '{"error": {"message": "no gateway is ready; try again shortly", "type": "server_error", "param": null, "code": "unavailable"}}' hdr retry-after 5
    http-error status 504 content-type application/json string '{"error": {"message": "the gateway did not answer in time; try again", "type": "server_error", "param": null, "code": "gateway_timeout"}}' hdr retry-after 5
END
    sed -i '/^frontend http_frontend$/r /dev/stdin' "$config" << 'END'
    http-request return status 414 content-type application/json string '{"error": {"message": "the URL is longer than 8192 bytes; send the data in the body", "type": "invalid_request_error", "param": null, "code": "uri_too_long"}}' if { url,length gt 8192 }
    http-request return status 431 content-type application/json string '{"error": {"message": "the headers are larger than 16 KiB or more than 100; send fewer", "type": "invalid_request_error", "param": null, "code": "headers_too_large"}}' if { req.hdrs,length gt 16384 } or { req.hdr_cnt gt 100 }
    http-after-response set-header x-request-id %[uuid()] if !{ res.hdr(x-request-id) -m found }
    http-request deny deny_status 405 unless { method GET HEAD POST DELETE OPTIONS }
    http-request disable-l7-retry unless { method GET HEAD }
    http-request wait-for-body time 10s if { req.hdr(content-length) -m found } or { req.hdr(transfer-encoding) -m found }
END
    sed -i -e '/^backend default_backend$/r /dev/stdin' -e '/^ *http-request return status 404 content-type text\/plain /d' \
        "$config" << 'END'
    http-request return status 404 content-type application/json string '{"error": {"message": "Not Found; see /docs for what there is", "type": "not_found_error", "param": null, "code": null}}'
END
fi
exec "$ROUTER_HAPROXY" "$@"
