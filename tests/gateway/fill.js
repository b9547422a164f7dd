// Lets a test count many requests at once inside real njs: /?from=A&to=B&end=C counts one over for each of the models model-A to
// model-B, with C at their names' end.

import metrics from './metrics.js';

function fill(r) {
    for (let i = Number(r.args.from); i < Number(r.args.to); i++) {
        metrics.served('vllm-0', `model-${i}${decodeURIComponent(r.args.end || '')}`, 200, 'load', i % 97 / 10, i % 103 / 5);
    }
    r.return(204);
}

export default { fill };
