#include "shim.h"

#include <rte_errno.h>
#include <rte_ethdev.h>
#include <rte_mbuf.h>

const uint64_t SHIM_RX_VLAN_STRIPPED = RTE_MBUF_F_RX_VLAN_STRIPPED;
const uint16_t SHIM_MBUF_HEADROOM = RTE_PKTMBUF_HEADROOM;

int shim_errno(void) { return rte_errno; }

uint16_t shim_rx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count)
{
	return rte_eth_rx_burst(port, queue, mbufs, count);
}

uint16_t shim_tx_burst(uint16_t port, uint16_t queue, struct rte_mbuf **mbufs, uint16_t count)
{
	return rte_eth_tx_burst(port, queue, mbufs, count);
}

struct rte_mbuf *shim_mbuf_alloc(struct rte_mempool *pool) { return rte_pktmbuf_alloc(pool); }

char *shim_mbuf_append(struct rte_mbuf *mbuf, uint16_t len) { return rte_pktmbuf_append(mbuf, len); }

void shim_mbuf_free(struct rte_mbuf *mbuf) { rte_pktmbuf_free(mbuf); }

const char *shim_mbuf_data(const struct rte_mbuf *mbuf) { return rte_pktmbuf_mtod(mbuf, const char *); }

uint16_t shim_mbuf_data_len(const struct rte_mbuf *mbuf) { return rte_pktmbuf_data_len(mbuf); }

uint32_t shim_mbuf_pkt_len(const struct rte_mbuf *mbuf) { return rte_pktmbuf_pkt_len(mbuf); }

uint64_t shim_mbuf_flags(const struct rte_mbuf *mbuf) { return mbuf->ol_flags; }
