#!/bin/sh
# Starts an end of the link: start.sh gateway|host [Nginx' binary]. Debian's Nginx has the stream module in a file, the official
# image has it built in.
end=$1
nginx=${2:-nginx}
module=/usr/lib/nginx/modules/ngx_stream_module.so
load=
[ ! -e "$module" ] || load="load_module $module;"
exec "$nginx" -c "/etc/nginx/link/$end.conf" -e stderr -g "$load daemon off;"
