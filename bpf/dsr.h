// SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause)
// Method dsr, direct server return: the frame goes to the backend, addressed to the service as it came; the backend
// holds the service's address and answers the client itself.
#pragma once

#include "forward.h"

static __always_inline int dsr_forward(struct packet *pkt, struct backend *backend)
{
	return send_to(pkt, backend_hop(backend));
}
