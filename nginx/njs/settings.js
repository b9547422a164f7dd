// The gateway's settings, from the environment. Wrong ones are named in the log at the start, and the safe value is taken.

import policies from './policies.js';
import timetable from './timetable.js';

const names = Object.keys(policies);
const policy = process.env.ROUTE_POLICY || names[0];
const complaints = names.includes(policy) ? [] : [`ROUTE_POLICY=${policy} is none of ${names.join(', ')}; ${names[0]} is used`];

// The entries of a setting with commas between. One that can never match is named, and left out.
function list(name, shape, what) {
    const entries = (process.env[name] || '').split(',').map((entry) => entry.trim().toLowerCase()).filter((entry) => entry);
    const wrong = entries.filter((entry) => !shape.test(entry));
    if (wrong.length) {
        complaints.push(`${name}: ${wrong.join(', ')} is no ${what}, and is not used`);
    }
    return entries.filter((entry) => shape.test(entry));
}

// MiB of disk for bodies; one of the largest must fit.
const bodies = process.env.GATEWAY_BODIES_MB || '1024';
const fits = /^\d{1,9}$/.test(bodies) && bodies >= 64;
if (!fits) {
    complaints.push(`GATEWAY_BODIES_MB=${bodies} is no number of MiB from 64 on; 1024 is used`);
}

const gateways = process.env.GATEWAYS || '1';
const counted = /^[1-9]\d?$/.test(gateways);
if (!counted) {
    complaints.push(`GATEWAYS=${gateways} is no number from 1 to 99; 1 is used`);
}

const rest = process.env.SLEEP_AFTER_SECONDS || '600';
const isRest = /^[1-9]\d{0,6}$/.test(rest);
if (!isRest) {
    complaints.push(`SLEEP_AFTER_SECONDS=${rest} is no number of seconds from 1 on; 600 is used`);
}

const hours = timetable.parse(process.env.AWAKE || '');
if (hours.wrong.length) {
    complaints.push(`AWAKE: ${hours.wrong.join('; ')} is no MODEL=Mon-Fri 08:00-18:00, and is not used`);
}

// The share of traces that is kept; where it is not set, none are made.
const share = process.env.TRACE_SAMPLE || '';
const isShare = /^\d*\.?\d+(e-?\d+)?$/.test(share) && share <= 1;
if (share && !isShare) {
    complaints.push(`TRACE_SAMPLE=${share} is no share from 0 to 1; no traces are made`);
}

// scripts/stack/settings.py has the same.
const NAME = '([a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?|\\[[0-9a-f:.]+\\])';
const HOST = new RegExp(`^${NAME}$`);
const ORIGIN = new RegExp(`^(http://${NAME}(:(?!80$)\\d+)?|https://${NAME}(:(?!443$)\\d+)?)$`);

// an IPv6 address in brackets, as Compose wants it
const address = process.env.BIND_ADDRESS || '127.0.0.1';
const loopback = /^(127\.|\[::1\]$|localhost$)/.test(address);

export default {
    policy: names.includes(policy) ? policy : names[0],
    // How many gateways are in front of the same replicas.
    gateways: counted ? Number(gateways) : 1,
    // Who needs a key: nobody (`off`), everyone once there are keys (`loopback`), everyone (`all`).
    auth: process.env.GATEWAY_AUTH === 'off' ? 'off' : loopback ? 'loopback' : 'all',
    // Why no request is let in while there are no keys.
    closed: `This gateway listens on ${address} and has no keys. Make one with \`make key\`; or set GATEWAY_AUTH=off to let `
        + 'everyone in, or BIND_ADDRESS=127.0.0.1.',
    // The folder of keys.json and tokens.json.
    secrets: `${process.env.SECRETS_FOLDER || '/etc/fleet/secrets'}/`,
    autoscaler: process.env.AUTOSCALER_FOLDER || '/var/lib/autoscaler',
    // Where clients reach HTTPS.
    httpsPort: process.env.HTTPS_PORT || '443',
    // Names, beside the local ones, that the gateway answers to.
    hosts: list('GATEWAY_HOSTS', HOST, 'name without scheme and port').concat(list('HTTPS_DOMAIN', HOST, 'name')),
    // Origins, as browsers write them, whose pages may use the gateway.
    origins: list('CORS_ORIGINS', ORIGIN, 'origin as browsers write it'),
    // Bytes on disk that bodies may take.
    bodies: (fits ? Number(bodies) : 1024) * 1024 * 1024,
    // Seconds without a request after which a model sleeps, where its replicas can.
    sleepAfter: isRest ? Number(rest) : 600,
    // The hours at which models are to be awake (timetable.js).
    awake: hours.models,
    // The share of traces that is kept, from 0 to 1; null: no traces are made.
    traces: isShare ? Number(share) : null,
    complaint: complaints.join('; '),
};
