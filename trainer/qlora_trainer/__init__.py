"""What runs inside the pods: inspect, train, merge, publish. An order in, a result out; see qlora_api.exchange."""
