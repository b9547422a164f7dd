// The gateway's settings, from the environment. Wrong ones are named in the log at the start, and the safe value is taken.

import policies from './policies.js';

const names = Object.keys(policies);
const policy = process.env.ROUTE_POLICY || names[0];
// The entries of a setting with commas between.
function list(name) {
    return (process.env[name] || '').split(',').map((entry) => entry.trim().toLowerCase()).filter((entry) => entry);
}

// MiB of disk for bodies; one of the largest must fit.
const bodies = process.env.GATEWAY_BODIES_MB || '1024';
const fits = /^\d{1,9}$/.test(bodies) && bodies >= 64;

// an IPv6 address in brackets, as Compose wants it
const address = process.env.BIND_ADDRESS || '127.0.0.1';

export default {
    policy: names.includes(policy) ? policy : names[0],
    // Why no request is let in, or ''.
    closed: /^(127\.|\[::1\]$|localhost$)/.test(address) || process.env.GATEWAY_AUTH === 'off' ? ''
        : `This gateway listens on ${address} and has no keys. Set GATEWAY_AUTH=off to let everyone in, or BIND_ADDRESS=127.0.0.1.`,
    // Names, beside the local ones, that the gateway answers to.
    hosts: list('GATEWAY_HOSTS'),
    // Origins, as browsers write them, whose pages may use the gateway.
    origins: list('CORS_ORIGINS'),
    // Bytes on disk that bodies may take.
    bodies: (fits ? Number(bodies) : 1024) * 1024 * 1024,
    complaint: !names.includes(policy) ? `ROUTE_POLICY=${policy} is none of ${names.join(', ')}; ${names[0]} is used`
        : fits ? '' : `GATEWAY_BODIES_MB=${bodies} is no number of MiB from 64 on; 1024 is used`,
};
