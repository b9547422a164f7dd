// The other designs' affinity (lab/bench/peers.py): what a conversation begins with is the key of where it goes.

const routes = ngx.shared.routes;

// js_access: the model and up to 1024 characters of the first message.
async function read(r) {
    try {
        const body = JSON.parse(await r.readRequestText());
        r.variables.key = body.model + body.messages[0].content.slice(0, 1024);
    } catch (e) {
        r.variables.key = r.variables.request_id;
    }
}

// js_set: the replica that this beginning was sent to; where there is none the balancer chooses.
function route(r) {
    return routes.get(r.variables.key) || '';
}

// js_header_filter: the balancer's choice is the next one's too.
function remember(r) {
    routes.set(r.variables.key, r.variables.upstream_addr);
}

export default { read, route, remember };
