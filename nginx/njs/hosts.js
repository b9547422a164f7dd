// What differs between hosts and should not.

import fleet from './fleet.js';

const CLOCK_S = 5;   // that clocks may differ

// How many seconds the clock of who wrote this Date header is ahead of this one; 0 where there is none.
function ahead(date) {
    const there = Date.parse(date);
    return there ? Math.round((there - Date.now()) / 1000) : 0;
}

// What differs between replicas and should not, a sentence each: their hosts' clocks, versions, and models of one name.
function differences(replicas) {
    const clocks = Object.create(null);
    const versions = Object.create(null);
    const models = Object.create(null);
    const note = (of, value, name) => { (of[value] = of[value] || []).push(name); };
    for (const { name, on } of replicas) {
        const { version, ahead, bases } = fleet.record(name);
        if (on && Math.abs(ahead) > CLOCK_S) {
            clocks[on] = ahead;
        }
        if (version) {
            note(versions, version, name);
        }
        for (const model of Object.keys(bases || {})) {
            note(models[model] = models[model] || Object.create(null), bases[model], name);
        }
    }
    const list = (of) => Object.keys(of).map((value) => `${of[value].join(', ')}: ${value}`).join('; ');
    const unequal = (of) => Object.keys(of).length > 1;
    return [].concat(
        Object.keys(clocks).map((on) => `The clock of ${on} is ${Math.abs(clocks[on])} s ${clocks[on] > 0 ? 'ahead' : 'behind'}.`),
        unequal(versions) ? `Replicas run different versions of vLLM: ${list(versions)}.` : [],
        Object.keys(models).filter((model) => unequal(models[model]))
            .map((model) => `Replicas serve different models as ${model}: ${list(models[model])}.`));
}

export default { ahead, differences };
