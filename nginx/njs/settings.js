// The gateway's settings, from the environment. Wrong ones are named in the log at the start, and the safe value is taken.

const POLICIES = ['prefix', 'least_busy', 'round_robin', 'session'];

const policy = process.env.ROUTE_POLICY || POLICIES[0];
// an IPv6 address in brackets, as Compose wants it
function list(name) {
    return (process.env[name] || '').split(',').map((entry) => entry.trim().toLowerCase()).filter((entry) => entry);
}

const address = process.env.BIND_ADDRESS || '127.0.0.1';

export default {
    policy: POLICIES.includes(policy) ? policy : POLICIES[0],
    // Why no request is let in, or ''.
    closed: /^(127\.|\[::1\]$|localhost$)/.test(address) || process.env.GATEWAY_AUTH === 'off' ? ''
        : `This gateway listens on ${address} and has no keys. Set GATEWAY_AUTH=off to let everyone in, or BIND_ADDRESS=127.0.0.1.`,
    // Names, beside the local ones, that the gateway answers to.
    hosts: list('GATEWAY_HOSTS'),
    // Origins, as browsers write them, whose pages may use the gateway.
    origins: list('CORS_ORIGINS'),
    complaint: POLICIES.includes(policy) ? '' : `ROUTE_POLICY=${policy} is none of ${POLICIES.join(', ')}; ${POLICIES[0]} is used`,
};
