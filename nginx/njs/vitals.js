// What the gateway tells of itself, for alerts before it is too late: its clock, its memory, the room in its zones, the end of its
// certificate, and keys that have used most of a quota.

import fs from 'fs';
import certificate from './certificate.js';
import fleet from './fleet.js';
import limits from './limits.js';

// Files of control groups, version 2 and 1: bytes in use, the limit, and where the pages stand that Linux may take back.
const GROUPS = [
    { folder: '/sys/fs/cgroup/', used: 'memory.current', limit: 'memory.max', idle: /^inactive_file (\d+)/m },
    { folder: '/sys/fs/cgroup/memory/', used: 'memory.usage_in_bytes', limit: 'memory.limit_in_bytes', idle: /^total_inactive_file (\d+)/m },
];
const UNLIMITED = 2 ** 60;   // bytes: version 1 has a number for no limit

function read(path) {
    try {
        return fs.readFileSync(path, 'utf8');
    } catch (e) {
        return undefined;
    }
}

// {used, limit} of this container's memory in bytes, of those that are known.
function memory() {
    for (const { folder, used, limit, idle } of GROUPS) {
        const now = read(folder + used);
        if (now !== undefined) {
            const [, free] = idle.exec(read(`${folder}memory.stat`) || '') || [0, 0];
            const most = Number(read(folder + limit));
            return { used: Number(now) - Number(free), limit: most < UNLIMITED ? most : undefined };
        }
    }
    return {};
}

// When the certificate ends, in seconds since 1970; undefined where there is none.
function certificateEnd(folder) {
    const pem = read(`${folder}/fullchain.pem`);
    try {
        return pem ? certificate.end(pem) : undefined;
    } catch (e) {
        ngx.log(ngx.ERR, `fullchain.pem: ${e.message}`);
        return undefined;
    }
}

// All of it: [name, help, [[labels, value], …]], those left out that are not known here.
function gauges(r) {
    const { used, limit } = memory();
    const zones = fleet.ZONES.map((zone) => [{ zone }, ngx.shared[zone]]);
    const one = (value) => value === undefined ? [] : [[{}, value]];
    return [
        ['gateway_time_seconds', "The gateway's clock, in seconds since 1970.", one(Date.now() / 1000)],
        ['gateway_memory_bytes', "Memory of the gateway's container in use, without what Linux may take back.", one(used)],
        ['gateway_memory_limit_bytes', "The limit of the container's memory.", one(limit)],
        ['gateway_zone_bytes', 'Size of a shared dictionary.', zones.map(([labels, zone]) => [labels, zone.capacity])],
        ['gateway_zone_free_bytes', 'Room in it that nothing has taken yet.', zones.map(([labels, zone]) => [labels, zone.freeSpace()])],
        ['gateway_certificate_end_seconds', 'When the certificate ends, in seconds since 1970.', one(certificateEnd(r.variables.certificates))],
        ['gateway_key_quota_used_ratio', 'Share of its day\'s or month\'s tokens that a key has used, from a half on.',
            limits.quotas().map(({ key, quota, share }) => [{ key, quota }, share])],
    ].filter(([, , values]) => values.length);
}

export default { gauges };
